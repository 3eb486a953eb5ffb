// What the page says when there is no run to show.
import { codeBlock, h } from "./dom.js";

const LINES = `from lightning_bn import ActivationStatsMonitor, ModeCheck
trainer = Trainer(callbacks=[ActivationStatsMonitor(), ModeCheck()])
trainer.fit(model, datamodule)`;

export const loading = () => h("div", { class: "message", role: "status", "aria-busy": "true" }, "Loading the run …");

export function empty(searched, file) {
  return h("div", { class: "message" },
    h("h2", {}, "No run to show yet"),
    h("p", {}, "These three lines make one:"),
    codeBlock(LINES, "pre"),
    h("p", { class: "muted" }, `Searched for ${file}, with all folders below: `, searched.length ? searched.map((path, index) => [index ? ", " : "", h("code", {}, path)]) : "no log directory was given"),
    h("p", { class: "muted" }, "A run appears here as soon as it has begun; this page looks again every few seconds."));
}

export function failed(error, again) {
  return h("div", { class: "message is-error", role: "alert" }, h("h2", {}, "The run can't be shown"), h("p", {}, error.message || String(error)), h("button", { type: "button", onclick: again }, "Try again"));
}

export const missingPlotly = (install) => h("div", { class: "message" },
  h("h2", {}, "The page needs plotly"), h("p", {}, "It draws with plotly.js, which the package plotly brings. Install it where TensorBoard runs, and start TensorBoard again:"),
  codeBlock(install));

// A run without samples still has findings, recalibrations and averages.
export function noSamples(run) {
  const unseen = run.statistics.length === 0;
  return h("div", { class: "message" }, unseen
    ? "No activation was sampled. ActivationStatsMonitor() in Trainer(callbacks=...) samples them, modules and functions alike."
    : "No layer has this statistic.");
}
