// The heat map of layers by steps.
import { h, replace, button } from "./dom.js";
import { against, count, number, place } from "./format.js";
import { CONFIG, colours, layout, axis } from "./theme.js";
import { makeRows } from "./rows.js";
import { limitsOf, paintMarks } from "./marks.js";
import { drawLane } from "./lane.js";

const ROW = { least: 13, most: 26 };

export class HeatMap {
  constructor(page) {
    this.page = page;
    this.labels = h("div", { class: "labels" });
    this.plot = h("div", { class: "plot" });
    this.cursor = h("div", { class: "cursor" });
    this.stripe = h("div", { class: "stripe" });
    this.tip = h("div", { class: "tip", role: "status", hidden: true });
    this.axis = h("div", { class: "plot axis" });
    this.lane = h("div", { class: "plot lane" });
    this.laneLabels = h("div", { class: "labels" });
    const area = h("div", { class: "area" }, this.plot, this.stripe, this.cursor);
    this.scroller = h("div", { class: "scroller" }, this.labels, area);
    this.element = h(
      "div", { class: "heatmap", tabindex: "0", "data-key": "map", "aria-label": "Heat map: arrow keys choose layer and step", onkeydown: (event) => this.key(event) },
      this.scroller,
      h("div", { class: "below" }, h("div", { class: "labels" }), this.axis),
      h("div", { class: "below" }, this.laneLabels, this.lane),
      this.tip,
    );
    this.rows = [];
    this.grid = null;
  }

  // Draws a grid; called when the data, the rows that are wanted, the size or the theme have changed.
  draw(grid, statistic) {
    const { state } = this.page;
    this.grid = grid;
    this.statistic = statistic;
    this.rows = makeRows(grid, statistic, {
      sort: state.get("sort"), filter: state.get("filter"), sick: state.get("sick") === "1",
      open: new Set(state.get("open").split(",").filter(Boolean)), fold: new Set(state.get("fold").split(",").filter(Boolean)),
    });
    this._labels();
    const isEmpty = !this.rows.length || !grid.first.length;
    this.element.classList.toggle("is-empty", isEmpty);
    if (isEmpty) return;
    this._plot();
    drawLane(this);
    this.select();
  }

  get columns() {
    return this.grid.first.length;
  }

  // The place of a step among the columns, which are as wide as each other.
  place(step) {
    const { first, last } = this.grid;
    let low = 0;
    let high = first.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (first[middle] <= step) low = middle;
      else high = middle - 1;
    }
    const end = low + 1 < first.length ? first[low + 1] : last[low] + 1;
    return low - 0.5 + Math.min(1, Math.max(0, (step - first[low]) / Math.max(1, end - first[low])));
  }

  _labels() {
    const chosen = this.page.layer();
    replace(this.labels, this.rows.map((row, index) => {
      const style = { height: `${this.rowHeight()}px`, paddingLeft: `${4 + 12 * row.depth}px` };
      const isChosen = row.layer === chosen && chosen !== "";
      const state = row.firstSick !== null ? " is-sick" : "";
      if (row.kind === "group") {
        const label = `${row.isOpen ? "▾" : "▸"} ${row.label} `;
        return h("button", { type: "button", class: `row group${state}`, style, title: row.name, "aria-expanded": String(row.isOpen), "data-key": `row:${row.name}`, tabindex: "-1", onclick: () => this.toggle(row) },
          label, h("span", { class: "muted" }, row.sick ? `${row.sick} of ${row.size} sick` : String(row.size)));
      }
      return h("button", { type: "button", class: `row${state}${isChosen ? " is-chosen" : ""}`, style, title: row.name, "data-key": `row:${row.name}`, "data-row": index, tabindex: "-1", onclick: () => this.page.state.set({ layer: row.layer }) }, row.label || "(the model)", this._kind(row));
    }));
  }

  // A number says nothing; the class does.
  _kind(row) {
    const found = /^\d+$/.test(row.label) ? this.page.run.layers.find((each) => each.name === row.layer) : null;
    return found?.class ? h("span", { class: "muted" }, ` ${found.class}`) : null;
  }

  rowHeight() {
    return Math.max(ROW.least, Math.min(ROW.most, Math.floor(420 / Math.max(1, this.rows.length))));
  }

  size() {
    return { width: Math.max(80, this.scroller.clientWidth - this.labels.offsetWidth), height: this.rows.length * this.rowHeight() };
  }

  _plot() {
    const { width, height } = this.size();
    const scale = this.statistic.scale || { low: null, high: null };
    const { rising, both } = colours();
    const z = this.rows.map((row) => row.values.map((value) => place(value, scale)));
    const trace = {
      type: "heatmap", z, x0: 0, dx: 1, y0: 0, dy: 1, hoverinfo: "none", showscale: false, zsmooth: false,
      colorscale: this.statistic.low != null && scale.colours !== "viridis" ? both : rising,
      ...(scale.low === null ? { zauto: true } : { zmin: scale.low, zmax: scale.high }),
    };
    const picture = paintMarks(this.rows, this.columns, this.statistic, width, height);
    this.marked = picture !== null;
    const range = { x: [-0.5, this.columns - 0.5], y: [this.rows.length - 0.5, -0.5] };
    const over = picture && { source: picture, xref: "paper", yref: "paper", x: 0, y: 1, sizex: 1, sizey: 1, sizing: "stretch", layer: "above" };
    const hidden = { visible: false };
    window.Plotly.react(this.plot, [trace], layout({
      width, height, dragmode: "zoom", images: over ? [over] : [],
      xaxis: { ...hidden, range: range.x }, yaxis: { ...hidden, range: range.y, fixedrange: true },
    }), CONFIG);
    this._listen();
    this._axis(width, range.x);
  }

  _axis(width, range) {
    const { first } = this.grid;
    const wanted = Math.max(2, Math.floor(width / 90));
    const places = [...new Set(Array.from({ length: wanted }, (_, i) => Math.floor(((i + 0.5) * this.columns) / wanted)))];
    const marks = { tickvals: places, ticktext: places.map((each) => count(first[each])), ticks: "outside", ticklen: 4 };
    window.Plotly.react(this.axis, [{ x: [0], y: [0], mode: "markers", marker: { opacity: 0 }, hoverinfo: "skip" }], layout({
      width, height: 24, margin: { l: 0, r: 0, t: 0, b: 22 }, xaxis: axis({ range, fixedrange: true, showgrid: false, ...marks }), yaxis: { visible: false, fixedrange: true },
    }), { ...CONFIG, staticPlot: true });
  }

  _listen() {
    if (this.listens) return;
    this.listens = true;
    this.plot.on("plotly_hover", (event) => this.hover(event.points[0]));
    this.plot.on("plotly_unhover", () => (this.tip.hidden = true));
    this.plot.on("plotly_click", (event) => this.pick(event.points[0].pointIndex));
    this.plot.on("plotly_relayout", (change) => {
      const range = change["xaxis.range"] || (change["xaxis.range[0]"] !== undefined && [change["xaxis.range[0]"], change["xaxis.range[1]"]]);
      if (range) this.zoom(range);
    });
    this.plot.addEventListener("dblclick", () => this.page.state.set({ from: "", to: "" }));
  }

  zoom([left, right]) {
    const column = (at) => Math.max(0, Math.min(this.columns - 1, Math.round(at)));
    const [first, last] = [column(left + 0.01), column(right - 0.01)];
    this.page.state.set({ from: this.grid.first[first], to: this.grid.last[Math.max(first, last)] });
  }

  pick([row, column]) {
    const chosen = this.rows[row];
    const layer = chosen.kind === "group" ? chosen.from[column] : chosen.layer;
    this.page.state.set({ layer, step: this.grid.first[column] });
    this.element.focus({ preventScroll: true });
  }

  hover(point) {
    const [row, column] = point.pointIndex;
    const chosen = this.rows[row];
    const value = chosen.values[column];
    const { first, last, rates } = this.grid;
    const span = first[column] === last[column] ? `step ${count(first[column])}` : `worst of steps ${count(first[column])} to ${count(last[column])}`;
    const words = chosen.warm[column] ? "warming up, says nothing yet" : against(value, limitsOf(chosen, column, this.statistic));
    replace(this.tip,
      h("strong", {}, (chosen.kind === "group" ? chosen.from[column] : chosen.layer) || "(the model)"),
      h("div", {}, span), h("div", {}, `${this.statistic.label}: ${number(value)}`), h("div", { class: "muted" }, words),
      rates[column] !== null && rates[column] !== undefined ? h("div", { class: "muted" }, `learning rate ${number(rates[column])}`) : null);
    this.tip.hidden = false;
    const box = this.element.getBoundingClientRect();
    const area = this.plot.getBoundingClientRect();
    const x = area.left - box.left + ((column + 0.5) / this.columns) * area.width;
    const y = area.top - box.top + (row + 1) * this.rowHeight();
    this.tip.style.left = `${Math.max(0, Math.min(x + 12, box.width - this.tip.offsetWidth - 4))}px`;
    this.tip.style.top = `${Math.min(y + 6, box.height - 8)}px`;
  }

  // Shows what is selected, without drawing anew.
  select() {
    const { state } = this.page;
    const index = this.chosen();
    const height = this.rowHeight();
    this.stripe.hidden = index < 0;
    this.stripe.style.top = `${index * height}px`;
    this.stripe.style.height = `${height}px`;
    const step = state.get("step");
    this.cursor.hidden = step === "" || !this.columns || Number(step) < this.grid.first[0] || Number(step) > this.grid.last[this.columns - 1];
    if (!this.cursor.hidden) this.cursor.style.left = `${((Math.floor(this.place(Number(step)) + 0.5 + 1e-9) + 0.5) / this.columns) * 100}%`;
    for (const label of this.labels.children) label.classList.toggle("is-chosen", Number(label.dataset.row) === index && index >= 0);
  }

  chosen() {
    const layer = this.page.layer();
    if (!layer) return -1;
    const exact = this.rows.findIndex((row) => row.layer === layer);
    return exact >= 0 ? exact : this.rows.findIndex((row) => row.kind === "group" && !row.isOpen && row.layers.includes(layer));
  }

  toggle(row) {
    const change = (name, isIn) => {
      const names = new Set(this.page.state.get(name).split(",").filter(Boolean));
      if (isIn) names.add(row.name);
      else names.delete(row.name);
      return [...names].join(",");
    };
    this.page.state.set({ open: change("open", !row.isOpen), fold: change("fold", row.isOpen) });
  }

  key(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const { state } = this.page;
    if (event.key === "Escape") state.set({ from: "", to: "", step: "" });
    else if (event.key === "Enter" && this.rows[this.chosen()]?.kind === "group") this.toggle(this.rows[this.chosen()]);
    else if (moves[event.key] && this.grid && this.rows.length && (event.target === this.element || this.labels.contains(event.target))) this._move(...moves[event.key]);
    else return;
    event.preventDefault();
  }

  _move(down, across) {
    const { state } = this.page;
    const next = Math.max(0, Math.min(this.rows.length - 1, this.chosen() + down));
    const row = this.rows[next];
    const column = state.get("step") === "" ? this.columns - 1 : Math.floor(this.place(Number(state.get("step"))) + 0.5 + 1e-9) + across;
    const kept = Math.max(0, Math.min(this.columns - 1, column));
    const layer = row.kind === "group" ? (down ? row.layers[0] : this.page.layer() || row.layers[0]) : row.layer;
    state.set({ layer, step: this.grid.first[kept] });
    this.labels.children[next]?.scrollIntoView({ block: "nearest" });
  }
}

export const zoomButton = (state) => (state.get("from") === "" ? null : button("Whole run", () => state.set({ from: "", to: "" }), { "data-key": "zoom-out" }));
