// The validation metric under each average, and which is recommended.
import { codeBlock, h, replace } from "./dom.js";
import { inWords, isNumber, plain } from "./format.js";
import { axis, colours, drawChart, stepAxis } from "./theme.js";
import { sortable } from "./table.js";

export function averages(page, holder, width) {
  const { averages } = page.run;
  const plot = h("div", { class: "plot" });
  const names = Object.keys(averages.values);
  const rows = names.map((name) => row(name, averages));
  replace(holder, h("section", { class: "block" },
    h("h3", {}, `${averages.monitor} under each average`),
    averages.recommended ? h("p", {}, "Recommended: ", h("strong", {}, averages.recommended), ", the best mean over the validations. ", averages.advice && codeBlock(averages.advice)) : null,
    averages.values.batch && h("p", { class: "muted" }, "batch: each validation batch normalised by its own statistics, as in training. It is no average that a layer could keep."),
    plot,
    sortable([
      { key: "name", label: "average", left: true }, { key: "mean", label: "mean" }, { key: "worst", label: "worst" }, { key: "last", label: "last" },
    ], rows, { by: "mean", descending: averages.mode === "max", chosen: (each) => each.name === averages.recommended })));
  const colour = colours();
  const traces = names.map((name, index) => ({
    type: "scatter", mode: averages.steps.length > 1 ? "lines+markers" : "markers", name: plain(name), x: averages.steps, y: averages.values[name].map((value) => (isNumber(value) ? value : null)),
    line: { color: colour.series[index % colour.series.length], width: name === averages.recommended ? 3 : 1.5 }, marker: { size: 4 }, hovertemplate: `${plain(name).replaceAll("%", "&#37;")}: %{y:.4g}<extra></extra>`,
  }));
  drawChart(plot, inWords(averages.monitor, Object.fromEntries(names.map((name) => [name, { steps: averages.steps, values: averages.values[name] }]))), traces, {
    width, height: 260, margin: { l: 52, r: 6, t: 8, b: 46 }, showlegend: true, legend: { orientation: "h", y: -0.25 },
    xaxis: stepAxis({ nticks: 6 }), yaxis: axis({ fixedrange: true, nticks: 5 }),
  });
}

function row(name, { values, mode }) {
  const known = values[name].filter(isNumber);
  if (!known.length) return { name, mean: null, worst: null, last: null };
  const worst = mode === "min" ? Math.max(...known) : Math.min(...known);
  return { name, mean: known.reduce((sum, each) => sum + each, 0) / known.length, worst, last: known[known.length - 1] };
}
