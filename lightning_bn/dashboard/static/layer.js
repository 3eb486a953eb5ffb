// One layer: what it is, what to do about it, and its numbers over the run.
import { h, button, replace } from "./dom.js";
import { code, count, isNumber, number, isSick } from "./format.js";
import { CONFIG, axis, colours, layout } from "./theme.js";
import { advice } from "./findings.js";
import { drawChannels } from "./channels.js";

const FAINT = 24; // other layers behind the chosen one
const FIRST = ["weight_min", "weight_max", "bias_min", "bias_max"];

export class LayerPanel {
  constructor(page) {
    this.page = page;
    this.facts = h("div", {});
    this.chart = h("div", { class: "plot" });
    this.small = h("div", { class: "plot" });
    this.channels = h("div", {});
    this.charts = h("div", { class: "charts" }, this.chart, this.small, this.channels);
    this.element = h("section", { class: "layer", "aria-label": "Layer" }, this.facts, this.charts);
    this.loaded = "";
  }

  async draw() {
    const { state, run } = this.page;
    const name = this.page.layer();
    const layers = run.layers.map((each) => each.name);
    const at = layers.indexOf(name);
    this.charts.hidden = at < 0;
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
    this._trend();
    this._others();
    drawChannels(this.channels, this.vectors, this.width(), state.get("step"));
  }

  width() {
    return Math.max(160, this.element.clientWidth - 24);
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
    for (const { stage, reason } of run.unseen.filter((each) => each.layer === layer.name)) facts.push([`not seen in ${{ train: "training", val: "validation" }[stage] ?? stage}`, reason]);
    // Training and validation often tell the same.
    const all = run.findings.filter((each) => each.layers.some((name) => name === layer.name || (name && layer.name.startsWith(`${name}.`))));
    const own = all.filter((each, place) => all.findIndex((other) => other.code === each.code && other.past === each.past) === place);
    const go = (label, name) => button(label, () => state.set({ layer: name }), { title: name ?? "", disabled: name === undefined, "data-key": `go:${label}` });
    replace(this.facts,
      h("h2", { title: layer.name }, layer.name || "(the model)"),
      h("div", { class: "neighbours" }, go("↑ before", up), go("↓ after", down)),
      h("dl", {}, facts.map(([label, value]) => [h("dt", {}, label), h("dd", {}, value)])),
      own.length ? h("div", {}, h("h3", {}, "What to do"), alike(own).map((same) => h("div", { class: "todo" }, same.map((each) => h("p", {}, h("strong", {}, each.title), ` since step ${count(each.first)}${each.stage === "val" ? ", in validation" : ""}${each.past ? ", over by now" : ""}`)), advice(same[0], run.rules)))) : h("p", { class: "muted" }, "Nothing was found here."));
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
    const stages = Object.entries(own).map(([stage, of], index) => ({ ...line(of.steps, of.values, { color: colour.series[index], width: 2 }), name: stage, showlegend: true, ...(of.steps.length < 2 ? { mode: "markers" } : {}) }));
    const known = [...faint, ...stages].flatMap((each) => each.y).filter(isNumber);
    const limits = [statistic.low, statistic.high].filter((limit) => isNumber(limit) && near(limit, known, statistic.log));
    const shapes = limits.map((y) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: colour.sick, width: 1.5, dash: "dash" } }));
    const step = state.get("step");
    if (step !== "") shapes.push({ type: "line", yref: "paper", y0: 0, y1: 1, x0: Number(step), x1: Number(step), line: { color: colour.accent, width: 1 } });
    this.chart.hidden = !stages.length;
    if (!stages.length) return;
    window.Plotly.react(this.chart, [...faint, ...stages], layout({
      width: this.width(), height: 210, margin: { l: 48, r: 6, t: 34, b: 26 }, shapes, showlegend: stages.length > 1,
      legend: { orientation: "h", x: 1, xanchor: "right", y: 1.02, yanchor: "bottom", font: { size: 11 } },
      title: { text: statistic.label, x: 0, xanchor: "left", y: 0.98, yanchor: "top", font: { size: 12 } },
      xaxis: axis({ fixedrange: true, nticks: 5 }), yaxis: axis({ fixedrange: true, nticks: 5, ...(statistic.log ? { type: "log", exponentformat: "power" } : {}) }),
    }), CONFIG);
  }

  // Every other statistic, small.
  _others() {
    const { run, statistic } = this.page;
    const colour = colours();
    const names = run.statistics.filter((each) => each.name !== statistic.name && this.series[each.name] && !FIRST.includes(each.name));
    this.small.hidden = !names.length;
    if (!names.length) return;
    const traces = [];
    const places = {};
    const annotations = [];
    names.forEach((each, index) => {
      const end = index ? String(index + 1) : "";
      Object.entries(this.series[each.name]).forEach(([, of], stage) => {
        traces.push({ ...line(of.steps, of.values, { color: of.values.some((value) => isSick(value, each)) ? colour.sick : colour.series[stage], width: 1.3 }), xaxis: "x", yaxis: `y${end}` });
      });
      const domain = [1 - (index + 0.86) / names.length, 1 - (index + 0.3) / names.length];
      places[`yaxis${end}`] = axis({ domain, fixedrange: true, nticks: 3, ...(each.log ? { type: "log", exponentformat: "power", nticks: 2 } : {}) });
      annotations.push({ text: each.label, xref: "paper", yref: "paper", x: 0, y: domain[1], xanchor: "left", yanchor: "bottom", showarrow: false, font: { size: 11, color: colour.muted } });
    });
    window.Plotly.react(this.small, traces, layout({
      width: this.width(), height: 76 * names.length + 24, margin: { l: 48, r: 6, t: 0, b: 24 }, annotations, xaxis: axis({ fixedrange: true, nticks: 5, anchor: names.length > 1 ? `y${names.length}` : "y" }), ...places,
    }), { ...CONFIG, staticPlot: true });
  }
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

const line = (x, values, style) => ({ type: "scatter", mode: "lines", x, y: values.map((value) => (isNumber(value) ? value : null)), line: style, hoverinfo: "x+y", showlegend: false });

// A limit that is far from every value would press the values into one line.
function near(limit, values, isLog) {
  if (!values.length) return true;
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (isLog) return limit > 0 && limit < high * 30 && limit > low / 30;
  const reach = Math.max(high - low, Math.abs(limit) * 0.5);
  return limit <= high + 3 * reach && limit >= low - 3 * reach;
}
