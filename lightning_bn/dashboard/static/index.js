// The tab in TensorBoard; it loads this module into a frame of its own and calls render.
import { Page } from "./app.js";
import { State, tensorboardAddress } from "./state.js";
import { servedSource } from "./source.js";
import { watchTheme } from "./theme.js";
import { missingPlotly } from "./states.js";
import { h, replace } from "./dom.js";

const own = (name) => new URL(name, import.meta.url).href;

function load(name) {
  return new Promise((resolve, reject) => {
    document.head.append(h("script", { src: own(name), onload: resolve, onerror: reject }));
  });
}

const style = () => new Promise((resolve) => document.head.append(h("link", { rel: "stylesheet", href: own("./page.css"), onload: resolve, onerror: resolve })));

export async function render() {
  const root = h("div", { class: "root" });
  document.body.append(root);
  let page;
  watchTheme(window.parent, () => page?.isReady && page.draw());
  const plotly = load("./plotly.min.js").then(() => true, () => false);
  await style();
  page = new Page(root, servedSource(import.meta.url), new State(tensorboardAddress("lightning_bn", window.parent)), plotly);
  if (await page.start()) return;
  const answer = await fetch(own("./plotly.min.js")).then((each) => each.json()).catch(() => ({}));
  replace(root, missingPlotly(answer.error ?? "pip install 'lightning-bn[dashboard]'"));
}
