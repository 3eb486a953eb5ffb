// What each recalibration changed, layer by layer.
import { h, replace } from "./dom.js";
import { count, isNumber, number, plural } from "./format.js";
import { axis, colours, drawChart } from "./theme.js";
import { sortable } from "./table.js";

const COLUMNS = [
  { key: "name", label: "layer", left: true, cell: (row) => row.name || "(the model)" },
  { key: "mean_shift_rms", label: "mean shift, rms" }, { key: "mean_shift_max", label: "max" },
  { key: "log_variance_ratio_rms", label: "log variance ratio, rms" }, { key: "log_variance_ratio_max", label: "max" },
  { key: "standard_error", label: "standard error" }, { key: "batches", label: "batches" },
];

export function recalibrations(page, holder, width) {
  const list = page.run.recalibrations;
  const plots = [];
  replace(holder, [...list].reverse().map((each, index) => {
    const plot = h("div", { class: "plot" });
    if (index < 3) plots.push([plot, each]);
    return h("section", { class: "block" },
      h("h3", {}, `Step ${count(each.step)}: `, h("span", { class: each.kept === false ? "bad" : "good" }, each.kept === false ? "rolled back" : "kept")),
      h("p", {}, words(each)),
      index < 3 ? plot : null,
      sortable(COLUMNS, each.report?.layers ?? [], { by: "mean_shift_rms", onrow: (row) => page.state.set({ layer: row.name }), chosen: (row) => row.name === page.state.get("layer") }));
  }));
  for (const [plot, each] of plots) draw(plot, each.report?.layers ?? [], width);
}

function words({ report, metric, before, after }) {
  const parts = [`${plural(report?.layers?.length ?? 0, "layer")} from ${plural(report?.batches ?? 0, "batch").replace("batchs", "batches")}, ${plural(report?.samples ?? 0, "sample")}.`];
  const error = Math.max(...(report?.layers ?? []).map((each) => each.standard_error).filter(isNumber));
  if (Number.isFinite(error)) parts.push(`Largest standard error of a mean: ${number(error)} standard deviations.`);
  if (isNumber(before)) parts.push(`${metric}: ${number(before)} before, ${number(after)} after.`);
  if (report?.skipped) parts.push(`${report.skipped} batches were not finite and left out.`);
  if (report?.not_run?.length) parts.push(`Not run: ${report.not_run.join(", ")}.`);
  return parts.join(" ");
}

function draw(plot, layers, width) {
  const colour = colours();
  const bars = (key, name, index) => ({ type: "bar", name, x: layers.map((_, place) => place), y: layers.map((each) => each[key]), marker: { color: colour.series[index] }, text: layers.map((each) => each.name.replaceAll("<", "&lt;")), textposition: "none", hovertemplate: "%{text}: %{y:.3g}<extra></extra>" });
  drawChart(plot, "Mean shift and log variance ratio of each layer; the table below has the numbers.", [bars("mean_shift_rms", "mean shift", 0), bars("log_variance_ratio_rms", "log variance ratio", 1)], {
    width, height: 170, margin: { l: 40, r: 6, t: 24, b: 24 }, showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    xaxis: axis({ fixedrange: true, showticklabels: false, title: { text: "layers in forward order", font: { size: 11, color: colour.muted } } }), yaxis: axis({ fixedrange: true, nticks: 4 }),
  });
}
