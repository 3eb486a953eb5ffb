// Under the map: what happened, at the steps of its columns.
import { described, h, replace } from "./dom.js";
import { colours } from "./theme.js";
import { count, isNumber } from "./format.js";

const HEIGHT = 16;
const EDGE = 6; // a symbol at the first or the last step is whole

// The rows of the lane, each with the steps at which something was, or spans of steps.
export function laneRows(run) {
  const { lanes } = run;
  const guard = run.findings.filter((each) => each.source === "guard");
  const rows = [
    { name: "learning rate", rates: lanes.rates },
    { name: "epochs", at: lanes.epochs.map(([step]) => step), symbol: "line" },
    { name: "validations", at: lanes.validations, symbol: "diamond" },
    { name: "findings", at: guard.map((each) => each.first), symbol: "cross", colour: "sick" },
    { name: "in eval mode", spans: lanes.eval, colour: "sick" },
    { name: "recalibrations", at: lanes.recalibrations.map(([step]) => step), symbol: "star" },
  ];
  return rows.filter((row) => (row.at || row.spans || row.rates).length);
}

export function drawLane(map) {
  const rows = laneRows(map.page.run);
  replace(map.laneLabels, rows.map((row) => h("div", { class: "row lane-label", style: { height: `${HEIGHT}px` } }, row.name)));
  map.lane.hidden = map.laneLabels.hidden = !rows.length;
  if (!rows.length) return;
  described(map.lane, rows.map(inWords).join(" "));
  const { width } = map.size();
  const context = canvasOf(map.lane, width, rows.length * HEIGHT);
  const across = (place) => ((place + 0.5) / map.columns) * width;
  const isZoomed = map.page.state.get("from") !== "";
  const { first, last } = map.grid;
  const inside = (step) => step >= first[0] && (step <= last[map.columns - 1] || !isZoomed);
  rows.forEach((row, index) => {
    const middle = (index + 0.5) * HEIGHT;
    context.fillStyle = context.strokeStyle = colours()[row.colour || "accent"];
    context.lineWidth = 1.5;
    if (row.rates) rates(context, row, middle, map, across);
    else if (row.spans) spans(context, row, middle, map, across);
    else for (const step of row.at.filter(inside)) symbols[row.symbol](context, Math.max(EDGE, Math.min(width - EDGE, across(map.place(step)))), middle);
  });
}

const inWords = ({ name, at, spans }) => (at ? `${name} at steps ${at.slice(0, 20).map(count).join(", ")}${at.length > 20 ? ", …" : ""}.` : spans ? `${name}: ${spans.slice(0, 20).map(({ layer, first, last }) => `${layer} from step ${count(first)} to ${count(last)}`).join(", ")}.` : "");

function canvasOf(canvas, width, height) {
  const scale = Math.min(window.devicePixelRatio || 1, 2);
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return context;
}

const polygon = (points) => (context, x, y) => {
  context.beginPath();
  for (const [dx, dy] of points) context.lineTo(x + dx, y + dy);
  context.closePath();
  context.fill();
};
const strokes = (lines) => (context, x, y) => {
  context.beginPath();
  for (const [[ax, ay], [bx, by]] of lines) {
    context.moveTo(x + ax, y + ay);
    context.lineTo(x + bx, y + by);
  }
  context.stroke();
};
const symbols = {
  line: strokes([[[0, -4.5], [0, 4.5]]]),
  cross: strokes([[[-4, -4], [4, 4]], [[-4, 4], [4, -4]]]),
  diamond: polygon([[0, -5], [5, 0], [0, 5], [-5, 0]]),
  star: polygon(Array.from({ length: 10 }, (_, n) => [Math.sin((n * Math.PI) / 5) * (n % 2 ? 2.4 : 6), -Math.cos((n * Math.PI) / 5) * (n % 2 ? 2.4 : 6)])),
};

// Spans of all layers lie over each other, and the layer's own panel tells which.
function spans(context, row, middle, map, across) {
  for (const { first, last } of row.spans) {
    const start = across(map.place(first));
    const end = Math.max(across(map.place(last)), start + 3);
    context.fillRect(start, middle - 4, end - start, 8);
  }
}

// Learning rates on the logarithmic scale of their own range.
function rates(context, row, middle, map, across) {
  const pairs = row.rates.map(([step, rates]) => [step, Object.values(rates)[0]]).filter(([, rate]) => isNumber(rate) && rate > 0);
  if (!pairs.length) return;
  const logs = pairs.map(([, rate]) => Math.log(rate));
  const [low, high] = [Math.min(...logs), Math.max(...logs)];
  const reach = 0.35 * HEIGHT;
  const down = (log) => middle + reach - (high > low ? (2 * reach * (log - low)) / (high - low) : reach);
  context.beginPath();
  pairs.forEach(([step], index) => {
    const x = across(map.place(step));
    if (index) context.lineTo(x, down(logs[index - 1]));
    context.lineTo(x, down(logs[index]));
  });
  context.lineTo(across(map.columns - 0.5), down(logs[logs.length - 1]));
  context.stroke();
}
