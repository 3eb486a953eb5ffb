// The tab in TensorBoard; it loads this module into a frame of its own and calls render.
import { Page } from "./app.js";
import { State, tensorboardAddress } from "./state.js";
import { servedSource } from "./source.js";
import { watchTheme } from "./theme.js";
import { h } from "./dom.js";

const own = (name) => new URL(name, import.meta.url).href;

// Returns what is wrong, as what to install, or null.
async function loadPlotly() {
  const loaded = await new Promise((resolve) => document.head.append(h("script", { src: own("./plotly.min.js"), onload: () => resolve(true), onerror: () => resolve(false) })));
  if (loaded) return null;
  const answer = await fetch(own("./plotly.min.js")).then((each) => each.json()).catch(() => ({}));
  return answer.error ?? "pip install 'lightning-bn[dashboard]'";
}

const style = () => new Promise((resolve) => document.head.append(h("link", { rel: "stylesheet", href: own("./page.css"), onload: resolve, onerror: resolve })));

export async function render() {
  const root = h("div", { class: "root" });
  document.body.append(root);
  let page;
  watchTheme(window.parent, () => page?.isReady && page.draw());
  await style();
  page = new Page(root, servedSource(import.meta.url), new State(tensorboardAddress("lightning_bn", window.parent)), loadPlotly);
  await page.start();
}
