// Two runs by the names of their layers: a map of differences; more of them as a table.
import { h, replace } from "./dom.js";
import { count, isNumber, number, ofLimit, plain } from "./format.js";
import { axis, colours, drawChart, stepAxis } from "./theme.js";
import { sortable } from "./table.js";

export async function compare(page, holder, width) {
  const { state, source } = page;
  const other = state.get("other");
  const [summaries, theirs] = await Promise.all([source.summaries(), other ? source.grid(other, page.statistic.name, state.get("stage"), state.get("from"), state.get("to")) : null]);
  if (state.get("view") !== "compare" || state.get("other") !== other) return;
  const map = h("div", { class: "difference" });
  replace(holder, theirs ? h("section", { class: "block" }, map) : null, h("section", { class: "block" }, h("h3", {}, "All runs"), runs(page, summaries)));
  if (theirs) drawDifference(page, map, page.grid, theirs, width);
}

function runs({ state, run }, summaries) {
  const rows = summaries.map((each) => ({ ...each, worst: each.nearest?.used ?? null, where: each.nearest?.layer ?? "" }));
  return sortable([
    { key: "name", label: "run", left: true }, { key: "verdict", label: "verdict", left: true },
    { key: "sick", label: "layers sick" }, { key: "recovered", label: "layers recovered" }, { key: "guard", label: "mistakes" },
    { key: "first", label: "first at", cell: (row) => (isNumber(row.first) ? count(row.first) : "–") },
    { key: "worst", label: "of limit", cell: (row) => (isNumber(row.worst) ? ofLimit(row.worst) : "–") }, { key: "gap", label: "gap" }, { key: "step", label: "steps" },
  ], rows, { by: "sick", onrow: (row) => state.set({ run: row.name, other: row.name === run.name ? state.get("other") : run.name }), chosen: (row) => row.name === run.name });
}

// Where both have a layer and a sample near the same step: the difference, on a logarithmic scale the ratio in decades.
export function difference(ours, theirs, isLog) {
  const layers = ours.layers.filter((name) => theirs.layers.includes(name));
  const match = ours.first.map((first, column) => nearest(theirs, first, ours.first[column + 1] ?? ours.last[column] + 1));
  const values = layers.map((name) => {
    const [mine, other] = [ours.values[ours.layers.indexOf(name)], theirs.values[theirs.layers.indexOf(name)]];
    return match.map((column, index) => (column === null ? null : apart(mine[index], other[column], isLog)));
  });
  return { layers, first: ours.first, values, only: [ours.layers.filter((name) => !layers.includes(name)), theirs.layers.filter((name) => !layers.includes(name))] };
}

function apart(mine, other, isLog) {
  if (!isNumber(mine) || !isNumber(other)) return null;
  if (!isLog) return mine - other;
  return mine > 0 && other > 0 ? Math.log10(mine / other) : null;
}

function nearest(grid, from, until) {
  let best = null;
  for (let column = 0; column < grid.first.length; column++) {
    if (grid.last[column] < from - (until - from) || grid.first[column] > until) continue;
    if (best === null || Math.abs(grid.first[column] - from) < Math.abs(grid.first[best] - from)) best = column;
  }
  return best;
}

function drawDifference(page, holder, ours, theirs, width) {
  const { statistic, state, run } = page;
  const found = difference(ours, theirs, Boolean(statistic.log));
  const plot = h("div", { class: "plot" });
  const tip = h("p", { class: "muted", role: "status" }, "Point at a cell to read it.");
  const words = statistic.log ? "decades" : "difference";
  const lists = [[run.name, found.only[0]], [state.get("other"), found.only[1]]].filter(([, names]) => names.length);
  replace(holder, h("h3", {}, `${statistic.label}: ${run.name} minus ${state.get("other")}`), found.layers.length ? [plot, tip] : h("p", {}, "The runs share no layer with this statistic."),
    lists.map(([name, names]) => h("p", { class: "muted" }, `Only in ${name}: ${names.slice(0, 12).join(", ")}${names.length > 12 ? ` and ${names.length - 12} more` : ""}`)));
  if (!found.layers.length) return;
  const told = `${statistic.label}: ${run.name} minus ${state.get("other")}, ${found.layers.length} layers by steps ${count(found.first[0])} to ${count(found.first[found.first.length - 1])}.`;
  const every = Math.ceil(found.layers.length / 40);
  const rows = found.layers.map((_, row) => row).filter((row) => row % every === 0);
  const reach = Math.max(0, ...found.values.flat().filter(isNumber).map(Math.abs));
  drawChart(plot, told, [{ type: "heatmap", z: found.values, zmin: -(reach || 1), zmax: reach || 1, colorscale: colours().both, hoverinfo: "none", showscale: reach > 0, colorbar: { thickness: 10, title: { text: words, side: "right" }, tickfont: { size: 10 } } }], {
    width, height: Math.max(140, Math.min(640, 14 * found.layers.length + 40)), margin: { l: 150, r: 60, t: 4, b: 36 },
    xaxis: stepAxis({ tickvals: ticks(found.first.length), ticktext: ticks(found.first.length).map((each) => count(found.first[each])) }), yaxis: axis({ autorange: "reversed", fixedrange: true, tickvals: rows, ticktext: rows.map((row) => shortened(found.layers[row])) }),
  });
  plot.on("plotly_hover", ({ points: [{ pointIndex: [row, column] }] }) => replace(tip, `${found.layers[row]}, step ${count(found.first[column])}: ${number(found.values[row][column])} ${words}`));
  plot.on("plotly_click", ({ points: [{ pointIndex: [row, column] }] }) => state.set({ layer: found.layers[row], step: found.first[column] }));
}

const shortened = (name) => plain(name.length > 22 ? `…${name.slice(-21)}` : name || "(the model)");

const ticks = (length) => [...new Set([0, 1, 2, 3, 4].map((each) => Math.round((each * (length - 1)) / 4)))];
