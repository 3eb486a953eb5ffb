// Who the run is, how it is, and how large the gap between training and evaluation is.
import { h, select } from "./dom.js";
import { causeOf } from "./findings.js";
import { count, number, ofLimit, plural, stageName, when } from "./format.js";
import { entry } from "./runs.js";

const SILENT = 600; // seconds without a line after which a run is not called live

export function stateOf(run, now = Date.now() / 1000) {
  if (run.status === "finished") return ["ended", "ended"];
  if (run.status) return ["stopped", `stopped: ${run.status}`];
  if (run.changed && now - run.changed < SILENT) return ["live", "live"];
  return ["stopped", run.changed ? `no line since ${when(run.changed)}` : "not ended"];
}

export function header(page) {
  const { state, run, runs } = page;
  const others = [["", "–"], ...runs.filter((name) => name !== run.name).map((name) => entry(name, page.summaries.get(name)))];
  const [kind, words] = stateOf(run);
  return h("header", {},
    h("div", { class: "bar" },
      runs.length > 1 || !run.name ? select("run", "Run", runs.map((name) => entry(name, page.summaries.get(name))), run.name, (value) => state.set({ run: value, layer: "", step: "", from: "", to: "" })) : h("span", { class: "name", title: run.directory }, run.name),
      runs.length > 1 && select("other", "Compare with", others, state.get("other"), (value) => state.set({ other: value, view: value ? "compare" : "map" })),
      h("span", { class: `state is-${kind}` }, words),
      h("span", { class: "muted" }, `step ${count(run.step)} · ${plural(run.samples.train || 0, "sample")} of training${run.samples.val ? `, ${run.samples.val} of validation` : ""}`),
    ),
    h("div", { class: "bar" }, verdict(run), gap(run)),
    run.unseen.length ? unseen(page) : null,
    run.notes.map((note) => h("div", { class: "note" }, note)),
  );
}

// A map without a layer is no word that the layer is well.
function unseen({ state, run }) {
  const names = [...new Set(run.unseen.map((each) => each.layer))];
  return h("details", { class: "note" }, h("summary", { "data-key": "unseen" }, `${plural(names.length, "layer")} can't be looked at`),
    run.unseen.map(({ layer, stage, reason }) => h("div", {}, h("button", { type: "button", class: "plain", onclick: () => state.set({ layer }) }, layer || "(the model)"), ` in ${stageName(stage)}: ${reason}`)));
}

function verdict(run) {
  const { level, text, nearest } = run.verdict;
  const cause = causeOf(run);
  return h("div", { class: `verdict is-${level}`, role: "status" },
    h("strong", {}, text), ".",
    cause && h("span", {}, ` First: ${cause.layers[0]}, ${cause.title}.`),
    nearest && h("span", {}, ` Nearest to a limit: ${nearest.layer}, ${nearest.label} ${number(nearest.value)}, ${nearest.used >= 1 ? "at the limit" : `${ofLimit(nearest.used)} of the way`}.`));
}

function gap(run) {
  const { metric, rows, how, source } = run.gap;
  if (!metric) return h("div", { class: "gap muted" }, "Train/eval gap: not measured. Measure it: ", h("code", {}, how));
  const names = { own: "own", recalibrated: "recalibrated", batch: "batch" };
  return h("div", { class: "gap", title: `measured by ${source}` }, h("span", { class: "muted" }, `Train/eval gap, ${metric} under statistics: `),
    Object.entries(rows).map(([name, value], index) => [index ? " · " : "", `${names[name] || name} `, value === null || value === undefined ? h("span", { class: "muted", title: how }, "not measured") : h("strong", {}, number(value))]));
}
