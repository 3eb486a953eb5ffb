// The heat map of layers by steps.
import { h, replace, button } from "./dom.js";
import { against, count, number, plural } from "./format.js";
import { makeRows } from "./rows.js";
import { thinned } from "./thin.js";
import { paintCells } from "./paint.js";
import { limitsOf, paintMarks } from "./marks.js";
import { follow } from "./pointer.js";
import { drawLane } from "./lane.js";

const ROW = { least: 13, most: 26 };

export class HeatMap {
  constructor(page) {
    this.page = page;
    this.labels = h("div", { class: "labels" });
    this.cells = h("canvas", { class: "cells" });
    this.marks = h("canvas", { class: "marks" });
    this.cursor = h("div", { class: "cursor" });
    this.stripe = h("div", { class: "stripe" });
    this.tip = h("div", { class: "tip", role: "status", hidden: true });
    this.axis = h("div", { class: "axis" });
    this.lane = h("canvas", { class: "lane" });
    this.laneLabels = h("div", { class: "labels" });
    this.area = h("div", { class: "area" }, this.cells, this.marks, this.stripe, this.cursor);
    this.scroller = h("div", { class: "scroller" }, this.labels, this.area);
    follow(this.area, {
      at: (event) => this._at(event), hover: (cell) => this.hover(cell), leave: () => (this.tip.hidden = true),
      pick: (cell) => this.pick(cell), zoom: (range) => this.zoom(range), reset: () => this.page.state.set({ from: "", to: "" }),
    });
    this.element = h(
      "div", { class: "heatmap", tabindex: "0", "data-key": "map", onkeydown: (event) => this.key(event) },
      this.scroller,
      h("div", { class: "below" }, h("div", { class: "labels" }, h("div", { class: "row axis-label" }, "step")), this.axis),
      h("div", { class: "below" }, this.laneLabels, this.lane),
      this.tip,
    );
    this.rows = [];
    this.grid = null;
  }

  // Draws a grid; called when the data, the rows that are wanted, the size or the theme have changed.
  draw(grid, statistic) {
    const { state } = this.page;
    this.grid = thinned(grid, Math.max(20, Math.floor(this.size().width)), statistic);
    this.statistic = statistic;
    this.rows = makeRows(this.grid, statistic, {
      sort: state.get("sort"), filter: state.get("filter"), sick: state.get("sick") === "1",
      open: new Set(state.get("open").split(",").filter(Boolean)), fold: new Set(state.get("fold").split(",").filter(Boolean)),
    });
    this._labels();
    const isEmpty = !this.rows.length || !this.columns;
    this.element.classList.toggle("is-empty", isEmpty);
    if (isEmpty) return;
    this._paint();
    this._describe();
    drawLane(this);
    this.select();
  }

  // The map in words, for who can't see it.
  _describe() {
    const layers = this.rows.filter((row) => row.kind !== "group");
    const sick = layers.filter((row) => row.firstSick !== null).sort((a, b) => a.firstSick - b.firstSick);
    const { first, last, layers: all } = this.grid;
    const words = sick.length ? `beyond the limits: ${sick.slice(0, 5).map((row) => `${row.layer || "(the model)"} from step ${count(row.firstSick)}`).join(", ")}${sick.length > 5 ? ` and ${sick.length - 5} more` : ""}` : layers.length ? "none of the rows shown is beyond its limits" : "all rows are folded";
    this.element.setAttribute("aria-label", `Heat map of the ${this.statistic.label}, ${plural(all.length, "layer")}, steps ${count(first[0])} to ${count(last[this.columns - 1])}; ${words}. Arrow keys choose layer and step.`);
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

  _paint() {
    const { width, height } = this.size();
    paintCells(this.cells, this.rows, this.columns, this.statistic);
    this.marked = paintMarks(this.marks, this.rows, this.columns, this.statistic, width, height);
    this.area.style.height = `${height}px`;
    this._axis(width);
  }

  _axis(width) {
    const { first } = this.grid;
    const wanted = Math.max(2, Math.floor(width / 90));
    const places = [...new Set(Array.from({ length: wanted }, (_, i) => Math.floor(((i + 0.5) * this.columns) / wanted)))];
    replace(this.axis, places.map((each) => h("span", { style: { left: `${((each + 0.5) / this.columns) * 100}%` } }, count(first[each]))));
  }

  // The cell below a pointer.
  _at({ clientX, clientY }) {
    const box = this.area.getBoundingClientRect();
    const within = (share, length) => Math.max(0, Math.min(length - 1, Math.floor(share * length)));
    return [within((clientY - box.top) / box.height, this.rows.length), within((clientX - box.left) / box.width, this.columns)];
  }

  zoom([left, right]) {
    const column = (share) => Math.max(0, Math.min(this.columns - 1, Math.round(share * this.columns - 0.5)));
    const width = 0.01 / this.columns;
    const [first, last] = [column(left + width), column(right - width)];
    this.page.state.set({ from: this.grid.first[first], to: this.grid.last[Math.max(first, last)] });
  }

  pick([row, column]) {
    const chosen = this.rows[row];
    const layer = chosen.kind === "group" ? chosen.from[column] : chosen.layer;
    this.page.state.set({ layer, step: this.grid.first[column] });
    this.element.focus({ preventScroll: true });
  }

  hover([row, column]) {
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
    const area = this.area.getBoundingClientRect();
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
