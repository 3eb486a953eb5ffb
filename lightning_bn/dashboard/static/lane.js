// Under the map: what happened, at the steps of its columns.
import { h, replace } from "./dom.js";
import { CONFIG, colours, layout } from "./theme.js";
import { isNumber } from "./format.js";

const HEIGHT = 16;

// The rows of the lane, each with the steps at which something was, or spans of steps.
export function laneRows(run) {
  const { lanes } = run;
  const guard = run.findings.filter((each) => each.source === "guard");
  const rows = [
    { name: "learning rate", rates: lanes.rates },
    { name: "epochs", at: lanes.epochs.map(([step]) => step), symbol: "line-ns-open" },
    { name: "validations", at: lanes.validations, symbol: "diamond" },
    { name: "guard findings", at: guard.map((each) => each.first), symbol: "x", colour: "sick" },
    { name: "in eval mode", spans: lanes.eval },
    { name: "recalibrations", at: lanes.recalibrations.map(([step]) => step), symbol: "star" },
  ];
  return rows.filter((row) => (row.at || row.spans || row.rates).length);
}

export function drawLane(map) {
  const run = map.page.run;
  const rows = laneRows(run);
  replace(map.laneLabels, rows.map((row) => h("div", { class: "row lane-label", style: { height: `${HEIGHT}px` } }, row.name)));
  map.lane.hidden = map.laneLabels.hidden = !rows.length;
  if (!rows.length) return;
  const { width } = map.size();
  const range = [-0.5, map.columns - 0.5];
  const isZoomed = map.page.state.get("from") !== "";
  const inside = (step) => step >= map.grid.first[0] && (step <= map.grid.last[map.columns - 1] || !isZoomed);
  const traces = rows.flatMap((row, index) => (row.rates ? [rates(row, index, map)] : row.spans ? [spans(row, index, map)] : [points(row, index, map, inside)]));
  window.Plotly.react(map.lane, traces, layout({
    width, height: rows.length * HEIGHT, xaxis: { visible: false, range, fixedrange: true }, yaxis: { visible: false, range: [rows.length - 0.5, -0.5], fixedrange: true },
  }), { ...CONFIG, staticPlot: true });
}

function points(row, index, map, inside) {
  const colour = colours();
  const x = row.at.filter(inside).map((step) => map.place(step));
  return { type: "scatter", mode: "markers", x, y: x.map(() => index), marker: { symbol: row.symbol, size: 8, color: colour[row.colour || "accent"], line: { width: 1.5, color: colour[row.colour || "accent"] } } };
}

// Spans as one line with gaps; layers lie over each other, and the layer's own panel tells which.
function spans(row, index, map) {
  const x = [];
  for (const { first, last } of row.spans) x.push(map.place(first), Math.max(map.place(last), map.place(first) + 0.3), null);
  return { type: "scatter", mode: "lines", x, y: x.map((each) => (each === null ? null : index)), line: { width: 8, color: colours().sick } };
}

// Learning rates on the logarithmic scale of their own range.
function rates(row, index, map) {
  const pairs = row.rates.map(([step, rates]) => [step, Object.values(rates)[0]]).filter(([, rate]) => isNumber(rate) && rate > 0);
  const logs = pairs.map(([, rate]) => Math.log(rate));
  const [low, high] = [Math.min(...logs), Math.max(...logs)];
  const y = logs.map((log) => index + 0.35 - (high > low ? (0.7 * (log - low)) / (high - low) : 0.35));
  const end = map.grid.last[map.columns - 1];
  return { type: "scatter", mode: "lines", x: [...pairs.map(([step]) => map.place(step)), map.place(end) + 1], y: [...y, y[y.length - 1]], line: { shape: "hv", width: 1.5, color: colours().accent } };
}
