// The page by itself: everything it needs lies in the file.
import { Page } from "./app.js";
import { State, ownAddress } from "./state.js";
import { embeddedSource } from "./source.js";
import { watchTheme } from "./theme.js";
import { h } from "./dom.js";

// plotly.js lies in the file as text, so that the map need not wait until it has started.
async function loadPlotly() {
  document.head.append(h("script", {}, document.getElementById("plotly").textContent));
  return window.Plotly ? null : "pip install 'lightning-bn[dashboard]'";
}

let page;
watchTheme(null, () => page?.isReady && page.draw());
const source = embeddedSource();
const state = new State(ownAddress());
const [run, other] = (await source.runs()).runs;
if (other !== undefined && !location.hash) state.set({ run, other, view: "compare" }); // who names two runs compares them
page = new Page(document.getElementById("page"), source, state, loadPlotly);
page.start();
