// The page: loads what is selected, draws it, and looks for what is new.
import { h, replace } from "./dom.js";
import { fitted } from "./format.js";
import { header } from "./header.js";
import { findings, layerOf } from "./findings.js";
import { Centre } from "./centre.js";
import { LayerPanel } from "./layer.js";
import { empty, failed, loading, missingPlotly } from "./states.js";
import { neediest } from "./runs.js";

const EVERY = 4000; // milliseconds between two looks at a live run
const SELDOM = 15; // looks at a run between two at the list of runs
const PATIENCE = 1500; // milliseconds that the page waits for the verdicts on all runs, to open the one that needs it

export class Page {
  // `loadPlotly` loads plotly.js, which takes a second to start; the map is drawn without it, and so is there before.
  constructor(root, source, state, loadPlotly) {
    Object.assign(this, { root, source, state, loadPlotly, run: null, grid: null, statistic: null, runs: [], summaries: new Map(), turn: 0, looks: 0 });
    this.top = h("div", {});
    this.left = h("div", { class: "side" });
    this.centre = new Centre(this);
    this.panel = new LayerPanel(this);
    this.body = h("main", { class: "page" }, this.top, h("div", { class: "columns" }, this.left, h("div", { class: "middle" }, this.centre.element, this.panel.charts), this.panel.element));
    this.message = h("div", {});
    root.append(this.message, this.body);
    state.listen((changed) => this.changed(changed));
    document.addEventListener("keydown", (event) => this.key(event));
    let width = 0;
    new ResizeObserver(() => {
      if (Math.abs(root.clientWidth - width) < 2) return;
      width = root.clientWidth;
      this.drawSoon();
    }).observe(root);
  }

  get map() {
    return this.centre.map;
  }

  async start() {
    this.say(loading());
    await this.guarded(() => this.look());
    if (this.source.live) setInterval(() => document.visibilityState === "visible" && this.refresh(), EVERY);
  }

  // Finds the runs, and shows the one of the address, or the one that needs it most.
  async look() {
    const { runs, searched, file } = await this.source.runs();
    this.runs = runs;
    if (!runs.length) return this.say(empty(searched, file));
    const judged = runs.length > 1 ? this.judge() : null;
    const wanted = this.state.get("run");
    if (!runs.includes(wanted)) await Promise.race([judged, new Promise((resolve) => setTimeout(resolve, PATIENCE))]);
    this.first = neediest([...this.summaries.values()]) ?? runs[0];
    await this.load(runs.includes(wanted) ? wanted : this.first);
  }

  // Learns the verdicts on all runs, which stand in the list of runs; that they can't be had is no reason to show nothing.
  async judge() {
    const summaries = await this.source.summaries().catch(() => []);
    this.summaries = new Map(summaries.map((each) => [each.name, each]));
    if (this.isReady) replace(this.top, header(this));
  }

  async load(name) {
    const turn = ++this.turn;
    const run = await this.source.run(name);
    if (turn !== this.turn) return;
    if (!run) throw new Error(`There is no run ${name}.`);
    this.run = run;
    await this.loadGrid(turn);
  }

  async loadGrid(turn = ++this.turn) {
    this.statistic = this.centre.choose();
    const [first, last] = [this.state.get("from"), this.state.get("to")];
    const stage = this.stage();
    const grid = this.statistic ? await this.source.grid(this.run.name, this.statistic.name, stage, first, last) : null;
    if (turn !== this.turn) return;
    this.grid = grid;
    if (grid) this.statistic = { ...this.statistic, scale: fitted(this.statistic.scale, grid.values) };
    this.isReady = true;
    this.say(null);
    this.draw();
  }

  // The layer that is shown: the chosen one, else the one to look at first.
  layer() {
    if (this.state.get("layer")) return this.state.get("layer");
    const { findings, verdict, layers } = this.run;
    const sick = findings.filter((each) => each.layers.length);
    const first = sick.find((each) => !each.past && each.source === "monitor") ?? sick[0];
    return (first && layerOf(this.run, first)) ?? verdict.nearest?.layer ?? layers[0]?.name ?? "";
  }

  stage() {
    const of = this.statistic?.stages ?? [];
    return of.includes(this.state.get("stage")) ? this.state.get("stage") : of[0];
  }

  // What has to be loaded or drawn anew when something else is selected.
  changed(changed) {
    if (!this.isReady) return;
    const any = (...names) => names.some((name) => changed.has(name));
    if (any("run") && this.state.get("run") !== this.run.name) this.guarded(() => this.load(this.state.get("run") || this.first));
    else if (any("statistic", "stage", "from", "to")) this.guarded(() => this.loadGrid());
    else if (any("sort", "filter", "sick", "open", "fold", "view", "other", "by")) this.draw();
    else this.drawSelection();
  }

  async refresh() {
    if (this.refreshing) return;
    this.refreshing = true;
    try {
      if (!this.run) return await this.look();
      if (++this.looks % SELDOM === 0) {
        this.runs = (await this.source.runs()).runs;
        if (this.runs.length > 1) await this.judge();
      }
      const run = await this.source.run(this.run.name, this.run.revision);
      if (run.same) {
        this.run.changed = run.changed;
        replace(this.top, header(this));
      } else if (run.name === this.run.name) {
        this.run = run;
        await this.loadGrid();
      }
    } catch {
      // The next look may find what this one did not: a server that is gone is no reason to take the page away.
    } finally {
      this.refreshing = false;
    }
  }

  draw() {
    this.body.hidden = false;
    replace(this.top, header(this));
    replace(this.left, findings(this));
    this.centre.draw();
    this.guarded(() => this.panel.draw());
  }

  // Draws what plotly.js draws, once it is there; the map is on the screen before it begins.
  async charted(holder, draw) {
    this.plotly ??= new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve))).then(this.loadPlotly);
    const failure = await this.plotly;
    if (failure) replace(holder, missingPlotly(failure));
    else await this.guarded(draw);
  }

  drawSelection() {
    replace(this.left, findings(this));
    this.centre.select();
    this.guarded(() => this.panel.draw());
  }

  drawSoon() {
    clearTimeout(this.soon);
    this.soon = setTimeout(() => this.isReady && this.draw(), 60);
  }

  say(content) {
    replace(this.message, content);
    this.body.hidden = Boolean(content) || !this.run;
  }

  async guarded(work) {
    try {
      await work();
    } catch (error) {
      console.error(error);
      this.say(failed(error, () => { this.say(loading()); this.guarded(() => this.look()); }));
    }
  }

  key(event) {
    const isTyping = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "/" && !isTyping) {
      this.root.querySelector('[data-key="filter"]')?.focus();
      event.preventDefault();
    }
  }
}
