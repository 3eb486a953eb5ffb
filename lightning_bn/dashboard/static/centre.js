// The middle of the page: the map, and the views that take its place.
import { causeOf } from "./findings.js";
import { h, replace, button, select } from "./dom.js";
import { number, plural, count, spacing, stageName } from "./format.js";
import { HeatMap, zoomButton } from "./map.js";
import { recalibrations } from "./recalibration.js";
import { averages } from "./averages.js";
import { compare } from "./compare.js";
import { saveCsv, savePng } from "./export.js";
import { noSamples } from "./states.js";
import { ramp } from "./paint.js";

export class Centre {
  constructor(page) {
    this.page = page;
    this.map = new HeatMap(page);
    this.views = h("div", { class: "tabs views", role: "tablist", "aria-label": "Views", onkeydown: arrows });
    this.tabs = h("div", { class: "tabs", role: "tablist", "aria-label": "Statistics", onkeydown: arrows });
    this.tools = h("div", { class: "tools" });
    this.legend = h("div", { class: "legend" });
    this.note = h("div", {});
    this.other = h("div", { class: "other" });
    this.mapParts = h("div", {}, this.tabs, this.tools, this.legend, this.note, this.map.element);
    this.element = h("section", { class: "centre", "aria-label": "Map" }, this.views, this.mapParts, this.other);
  }

  // The statistics that have a map, those with sick layers first.
  statistics() {
    const all = this.page.run.statistics;
    const mapped = all.filter((each) => each.scale);
    return (mapped.length ? mapped : all).map((each, place) => ({ each, place }))
      .sort((a, b) => b.each.sick - a.each.sick || b.each.past - a.each.past || a.place - b.place).map(({ each }) => each);
  }

  choose() {
    const all = this.statistics();
    const named = (name) => all.find((each) => each.name === name);
    const nearest = all[0]?.sick || all[0]?.past ? null : this.page.run.verdict.nearest; // where all is well
    return named(this.page.state.get("statistic")) ?? named(causeOf(this.page.run)?.statistic) ?? named(nearest?.statistic) ?? all[0] ?? null;
  }

  width() {
    return Math.max(200, this.element.clientWidth - 24);
  }

  draw() {
    const { page } = this;
    const view = this.view();
    this._views(view);
    this.mapParts.hidden = view !== "map";
    this.other.hidden = view === "map";
    if (view === "map") this._map();
    const drawn = { recalibration: recalibrations, averages, compare }[view];
    if (drawn) page.charted(this.other, () => this.view() === view && drawn(page, this.other, this.width()));
  }

  select() {
    if (this.view() === "map" && this.page.grid) this.map.select();
  }

  view() {
    const wanted = this.page.state.get("view");
    return this._known().some(([name]) => name === wanted) ? wanted : "map";
  }

  _known() {
    const { run, runs } = this.page;
    return [["map", "Map"], run.recalibrations.length && ["recalibration", "Recalibration"], run.averages && ["averages", "Averages"], runs.length > 1 && ["compare", "Compare"]].filter(Boolean);
  }

  _views(view) {
    const known = this._known();
    this.views.hidden = known.length < 2;
    replace(this.views, known.map(([name, label]) => tab(label, name === view, `view:${name}`, () => this.page.state.set({ view: name }))));
  }

  _map() {
    const { page } = this;
    const { statistic, grid } = page;
    replace(this.tabs, this.statistics().map((each) => tab(
      [each.name.replaceAll("_", " "), each.sick ? h("span", { class: "badge" }, each.sick) : each.past ? h("span", { class: "badge is-past" }, each.past) : null],
      each === statistic || each.name === statistic?.name, `statistic:${each.name}`, () => page.state.set({ statistic: each.name, from: "", to: "" }), each.label)));
    const isEmpty = !grid || !grid.layers.length;
    this.tools.hidden = this.legend.hidden = isEmpty;
    this.map.element.hidden = isEmpty;
    replace(this.note, isEmpty ? noSamples(page.run) : null);
    if (isEmpty) return;
    this._tools();
    this.map.draw(grid, statistic);
    this._legend();
    if (!this.map.rows.length) replace(this.note, h("div", { class: "message" }, page.state.get("sick") ? "No layer was beyond its limits here." : "No layer has this name."));
  }

  _tools() {
    const { page } = this;
    const { state } = page;
    replace(this.tools,
      page.statistic.stages.length > 1 && select("stage", "Stage", page.statistic.stages.map((name) => [name, stageName(name)]), page.stage(), (stage) => state.set({ stage, from: "", to: "" })),
      select("sort", "Order", [["forward", "forward"], ["worst", "worst first"], ["first", "first sick"]], state.get("sort"), (sort) => state.set({ sort })),
      h("label", { class: "field" }, h("span", {}, "Filter"), h("input", { type: "search", value: state.get("filter"), placeholder: "layer4.*  ( / )", "data-key": "filter", oninput: (event) => state.set({ filter: event.target.value }) })),
      h("label", { class: "check" }, h("input", { type: "checkbox", checked: state.get("sick") === "1", "data-key": "sick", onchange: (event) => state.set({ sick: event.target.checked ? "1" : "" }) }), "sick only"),
      h("span", { class: "space" }),
      zoomButton(state),
      button("PNG", () => page.guarded(() => savePng(page)), { "data-key": "png", title: "Save the map as a picture" }),
      button("CSV", () => saveCsv(page), { "data-key": "csv", title: "Save the numbers of the map" }));
  }

  _legend() {
    const { grid, statistic } = this.page;
    const { scale } = statistic;
    const stops = ramp(statistic).map(([at, colour]) => `${colour} ${at * 100}%`).join(", ");
    const end = (value) => (scale.log ? (scale.count && value === scale.low ? "0" : number(10 ** value)) : number(value));
    const limits = [statistic.low, statistic.high].filter((each) => each !== null && each !== undefined).map(number).join(" and ");
    const { columns } = this.map;
    const thinned = grid.samples > columns;
    const uneven = thinned ? "" : spacing(grid.first);
    replace(this.legend,
      h("strong", {}, statistic.label),
      scale && h("span", { class: "scale" }, end(scale.low), h("span", { class: "ramp", style: { background: `linear-gradient(90deg, ${stops})` } }), end(scale.high)),
      h("span", {}, h("i", { class: "mark is-sick" }), limits ? `beyond the limit (${limits})` : "beyond a limit"),
      h("span", {}, h("i", { class: "mark is-warm" }), "warming up"), h("span", {}, h("i", { class: "mark is-nan" }), "NaN"), h("span", {}, h("i", { class: "mark is-missing" }), "missing"),
      thinned && h("span", { class: "muted" }, `thinned: ${count(grid.samples)} samples in ${plural(columns, "column")}, each the worst of its samples${this.page.source.live ? "; drag to zoom for more" : ""}`),
      uneven && h("span", { class: "muted" }, uneven));
  }
}

function tab(label, isChosen, key, onclick, title) {
  return h("button", { type: "button", role: "tab", "aria-selected": String(isChosen), tabindex: isChosen ? "0" : "-1", class: isChosen ? "is-chosen" : "", "data-key": key, title, onclick }, label);
}

function arrows(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const tabs = [...event.currentTarget.children];
  const next = tabs[(tabs.indexOf(event.target) + step + tabs.length) % tabs.length];
  next.focus();
  next.click();
  event.preventDefault();
}
