// One layer: what it is, what to do about it, and its numbers over the run.
import { breakable, h, button, replace } from "./dom.js";
import { code, count, inWords, isNumber, number, isSick, plain, stageName, wrapped } from "./format.js";
import { axis, colours, drawChart, stepAxis } from "./theme.js";
import { advice, inStage } from "./findings.js";
import { drawChannels } from "./channels.js";

const FAINT = 24; // other layers behind the chosen one
const FEW = 12; // samples that are points on their line: a line through few says little of what was between
const LETTER = 6.4; // points that a letter of a small title takes
const WIDE = 340; // points that a small chart has at least, where there is room for two side by side
const FIRST = ["weight_min", "weight_max", "bias_min", "bias_max"];

export class LayerPanel {
  constructor(page) {
    this.page = page;
    this.facts = h("div", {});
    this.chart = h("div", { class: "plot" });
    this.small = h("div", { class: "plot" });
    this.same = h("p", { class: "muted" });
    this.channels = h("div", {});
    this.title = h("h3", {});
    // Below the map, where there is room.
    this.charts = h("section", { class: "layer charts", "aria-label": "The layer over the run" }, this.title, this.chart, this.small, this.same);
    this.element = h("section", { class: "layer", "aria-label": "Layer" }, this.facts, this.channels);
    this.loaded = "";
  }

  async draw() {
    const { state, run } = this.page;
    const name = this.page.layer();
    const layers = run.layers.map((each) => each.name);
    const at = layers.indexOf(name);
    this.charts.hidden = this.channels.hidden = at < 0;
    if (at < 0) {
      replace(this.facts, h("h2", {}, "Layer"), h("p", { class: "muted" }, name ? `This run has no layer ${name}.` : "Choose a layer: a row of the map, or a finding."));
      return;
    }
    this._facts(run.layers[at], layers[at - 1], layers[at + 1]);
    const wanted = `${run.name}/${name}/${run.revision}`;
    if (this.loaded !== wanted) {
      const [series, channels] = await Promise.all([this.page.source.layer(run.name, name), this.page.source.channels(run.name, name)]);
      if (this.page.layer() !== name) return; // another was chosen meanwhile
      Object.assign(this, { loaded: wanted, series, vectors: channels });
      this._facts(run.layers[at], layers[at - 1], layers[at + 1]); // the affine range is known now
    }
    await this.page.charted(this.charts, () => this.page.layer() === name && this._charts());
  }

  _charts() {
    const { state } = this.page;
    replace(this.title, `${this.page.layer() || "(the model)"} over the run`);
    this._trend();
    this._others();
    drawChannels(this.channels, this.vectors, room(this.element), state.get("step"));
  }

  _facts(layer, up, down) {
    const { state, run } = this.page;
    const names = { class: "class", channels: "channels", averaging: "averaging", momentum: "momentum", affine: "affine", frozen: "frozen" };
    const facts = Object.entries(names).filter(([key]) => layer[key] !== undefined && layer[key] !== null).map(([key, label]) => [label, String(layer[key])]);
    for (const kind of ["weight", "bias"]) {
      const ends = ["min", "max"].map((end) => this._last(`${kind}_${end}`));
      if (ends.every(isNumber)) facts.push([`affine ${kind}`, `${number(ends[0])} to ${number(ends[1])}`]);
    }
    const spans = run.lanes.eval.filter((each) => each.layer === layer.name).map((each) => `${count(each.first)} to ${count(each.last)}`);
    if (spans.length) facts.push(["eval mode in training", `steps ${spans.join(", ")}`]);
    for (const { stage, reason } of run.unseen.filter((each) => each.layer === layer.name)) facts.push([`not seen in ${stageName(stage)}`, reason]);
    // Training and validation often tell the same.
    const all = run.findings.filter((each) => each.layers.some((name) => name === layer.name || (name && layer.name.startsWith(`${name}.`))));
    const own = all.filter((each, place) => all.findIndex((other) => other.code === each.code && other.past === each.past) === place);
    const go = (label, name) => button(label, () => state.set({ layer: name }), { title: name ?? "", disabled: name === undefined, "data-key": `go:${label}` });
    replace(this.facts,
      h("h2", { title: layer.name }, breakable(layer.name || "(the model)")),
      h("div", { class: "neighbours" }, go("↑ before", up), go("↓ after", down)),
      h("dl", {}, facts.map(([label, value]) => [h("dt", {}, label), h("dd", {}, value)])),
      own.length ? h("div", {}, h("h3", {}, "What to do"), alike(own).map((same) => h("div", { class: "todo" }, same.map((each) => h("p", {}, h("strong", {}, each.title), ` since step ${count(each.first)}${inStage(each)}${each.past ? ", over by now" : ""}`)), advice(same[0], run.rules)))) : h("p", { class: "muted" }, "Nothing was found here."));
  }

  _last(statistic) {
    const of = this.loaded.includes(`/${this.page.layer()}/`) ? this.series?.[statistic]?.train : null;
    return of ? of.values[of.values.length - 1] : null;
  }

  // The statistic that is chosen, with its limits, training and validation, and other layers faint behind.
  _trend() {
    const { state, grid, statistic } = this.page;
    const colour = colours();
    const own = this.series[statistic.name] || {};
    const name = this.page.layer();
    const others = (grid?.layers || []).map((other, row) => [other, row]).filter(([other]) => other !== name);
    const every = Math.max(1, Math.ceil(others.length / FAINT));
    const faint = others.filter((_, index) => index % every === 0).map(([, row]) => line(grid.first, grid.values[row], { color: colour.faint, width: 1 }));
    const stages = Object.entries(own).map(([stage, of], index) => ({ ...line(of.steps, of.values, { color: colour.series[index], width: 2 }), name: stage, showlegend: true }));
    const known = [...faint, ...stages].flatMap((each) => each.y).filter(isNumber);
    const limits = [statistic.low, statistic.high].filter((limit) => isNumber(limit) && near(limit, known, statistic.log));
    const shapes = limits.map((y) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: colour.sick, width: 1.5, dash: "dash" } }));
    const step = state.get("step");
    if (step !== "") shapes.push({ type: "line", yref: "paper", y0: 0, y1: 1, x0: Number(step), x1: Number(step), line: { color: colour.accent, width: 1 } });
    this.chart.hidden = !stages.length;
    if (!stages.length) return;
    drawChart(this.chart, inWords(`${statistic.label} of ${name}`, own, statistic), [...faint, ...stages], {
      width: room(this.charts), height: 230, margin: { l: 48, r: 6, t: 34, b: 36 }, shapes, showlegend: stages.length > 1,
      legend: { orientation: "h", x: 1, xanchor: "right", y: 1.02, yanchor: "bottom", font: { size: 11 } },
      title: { text: statistic.label, x: 0, xanchor: "left", y: 0.98, yanchor: "top", font: { size: 12 } },
      xaxis: stepAxis({ nticks: 8 }), yaxis: axis({ fixedrange: true, nticks: 5, ...scaled(statistic) }),
    });
  }

  // Every other statistic, small, side by side; what never changed is said in words.
  _others() {
    const { run, statistic } = this.page;
    const all = run.statistics.filter((each) => each.name !== statistic.name && this.series[each.name] && !FIRST.includes(each.name));
    const same = all.filter((each) => isConstant(this.series[each.name]));
    const names = all.filter((each) => !same.includes(each));
    replace(this.same, same.length ? `Unchanged: ${same.map((each) => `${title(each)}: ${number(Object.values(this.series[each.name])[0].values[0])}`).join("; ")}.` : "");
    this.small.hidden = !names.length;
    if (!names.length) return;
    const width = room(this.charts);
    const across = Math.max(1, Math.min(3, names.length, Math.floor(width / WIDE)));
    const titles = names.map((each) => wrapped(title(each), Math.floor(((width - 54) / across - 8) / LETTER)));
    const above = 9 + 14 * Math.max(...titles.map((lines) => lines.length)); // points of a row that its title takes
    const high = above + 53;
    const down = Math.ceil(names.length / across);
    const traces = [];
    const places = {};
    const annotations = [];
    names.forEach((each, index) => {
      const [column, row] = [index % across, Math.floor(index / across)];
      const [x, y] = [nth(column), nth(index)];
      const [left, right] = [(column + (column ? 0.08 : 0)) / across, (column + 1 - (column + 1 < across ? 0.02 : 0)) / across];
      const domain = [1 - (row + (high - 10) / high) / down, 1 - (row + above / high) / down];
      Object.values(this.series[each.name]).forEach((of, stage) => {
        const isBad = of.values.some((value) => isSick(value, each));
        traces.push({ ...line(of.steps, of.values, { color: isBad ? colours().sick : colours().series[stage], width: 1.3 }), xaxis: `x${x}`, yaxis: `y${y}` });
      });
      places[`yaxis${y}`] = axis({ domain, anchor: `x${x}`, fixedrange: true, nticks: 3, ...scaled(each, 2) });
      places[`xaxis${x}`] = stepAxis({ domain: [left, right], anchor: `y${y}`, nticks: 5 }); // below the last of its column
      annotations.push({ text: titles[index].map(plain).join("<br>"), align: "left", xref: "paper", yref: "paper", x: left, y: domain[1], xanchor: "left", yanchor: "bottom", showarrow: false, font: { size: 11, color: colours().muted } });
    });
    const words = names.map((each) => inWords(title(each), this.series[each.name], each)).join(" ");
    drawChart(this.small, words, traces, { width, height: high * down + 36, margin: { l: 48, r: 6, t: 0, b: 36 }, annotations, ...places }, true);
  }
}

const room = (element) => Math.max(160, element.clientWidth - 24);
const nth = (index) => (index ? String(index + 1) : ""); // plotly's first axis has no number
const title = ({ label, name }) => (label === name ? name.replaceAll("_", " ") : label);

// plotly writes powers a quarter larger than other numbers.
const scaled = ({ log }, nticks = 5) => (log ? { type: "log", exponentformat: "power", nticks, tickfont: { color: colours().muted, size: 9 } } : {});

function isConstant(stages) {
  const values = Object.values(stages).flatMap((of) => of.values);
  return isNumber(values[0]) && values.every((value) => value === values[0]);
}

// Several illnesses of a layer often have one remedy, which is told once.
function alike(findings) {
  const found = new Map();
  for (const each of findings) {
    const fix = code(each.fix);
    const key = fix.code || fix.note;
    found.set(key, [...(found.get(key) ?? []), each]);
  }
  return [...found.values()];
}

const line = (x, values, style) => ({ type: "scatter", mode: x.length > FEW ? "lines" : "lines+markers", marker: { size: 5 }, x, y: values.map((value) => (isNumber(value) ? value : null)), line: style, hoverinfo: "x+y", showlegend: false });

// A limit that is far from every value would press the values into one line.
function near(limit, values, isLog) {
  if (!values.length) return true;
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (isLog) return limit > 0 && limit < high * 30 && limit > low / 30;
  const reach = Math.max(high - low, Math.abs(limit) * 0.5);
  return limit <= high + 3 * reach && limit >= low - 3 * reach;
}
