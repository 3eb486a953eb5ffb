// What was found, in one list: the cause first, and what follows from it below.
import { breakable, codeBlock, h, link, select } from "./dom.js";
import { code, count, plural, stageName } from "./format.js";
import { matches } from "./rows.js";
import { markdown } from "./markdown.js";

export function shown(run, state) {
  const [level, rule, layer, time] = ["level", "rule", "where", "time"].map((name) => state.get(name));
  return run.findings.map((finding, place) => ({ ...finding, place })).filter((each) =>
    (!level || each.level === level) && (!rule || each.code === rule) && (!time || (time === "past") === each.past) &&
    (!layer || each.layers.some((name) => matches(name, layer))));
}

export function findings(page) {
  const { run, state } = page;
  const list = shown(run, state);
  const known = new Set(list.map((each) => each.place));
  const heads = list.filter((each) => each.follows === null || !known.has(each.follows));
  return h("section", { class: "findings", "aria-label": "Findings" },
    h("h2", {}, "Findings ", h("span", { class: "muted" }, list.length === run.findings.length ? list.length : `${list.length} of ${run.findings.length}`)),
    run.findings.length ? filters(page) : null,
    h("div", { class: "list", "data-scroll": "findings" },
      heads.map((head) => group(page, head, list.filter((each) => each.follows === head.place))),
      !run.findings.length && nothing(run),
      run.findings.length > 0 && !list.length && h("p", { class: "muted" }, "None for these filters."),
    ),
  );
}

function nothing(run) {
  const { nearest } = run.verdict;
  return h("p", { class: "muted" }, run.verdict.level === "unknown" ? "Nothing was sampled yet." : "No episode of illness, and no mistake of modes or statistics.", nearest && ` The layer nearest to a limit is ${nearest.layer}.`);
}

function filters({ run, state }) {
  const option = (values, all) => [["", all], ...[...new Set(values)].sort().map((value) => [value, value])];
  return h("div", { class: "filters" },
    select("level", "Level", option(run.findings.map((each) => each.level), "all"), state.get("level"), (level) => state.set({ level })),
    select("rule", "Rule", option(run.findings.map((each) => each.code), "all"), state.get("rule"), (rule) => state.set({ rule })),
    select("time", "When", [["", "any"], ["now", "now"], ["past", "past"]], state.get("time"), (time) => state.set({ time })),
    h("label", { class: "field" }, h("span", {}, "Layer"), h("input", { type: "search", value: state.get("where"), placeholder: "layer4.*", "data-key": "where", oninput: (event) => state.set({ where: event.target.value }) })),
  );
}

function group(page, head, followers) {
  const below = followers.length > 0 && h("details", {}, h("summary", { "data-key": `follow:${head.place}` }, `${plural(followers.length, "finding")} below it ${followers.length === 1 ? "follows" : "follow"}`), followers.map((each) => item(page, each)));
  return h("div", { class: "group" }, item(page, head), below);
}

// What is to be looked at first: the cause of what is sick now.
export const causeOf = (run) => run.findings.find((each) => each.source === "monitor" && !each.past && each.follows === null);

// The layer to look at: of a finding on a module that has layers below, the first of these.
export function layerOf(run, finding) {
  const name = finding.layers[0] ?? "";
  const known = run.layers.map((each) => each.name);
  return known.includes(name) ? name : (known.find((each) => each.startsWith(`${name}.`)) ?? name);
}

function item({ state, run }, finding) {
  const layer = layerOf(run, finding);
  const isChosen = state.get("layer") === layer && state.get("step") === String(finding.first) && layer !== "";
  const span = finding.last > finding.first ? `steps ${count(finding.first)} to ${finding.past ? count(finding.last) : "now"}` : `step ${count(finding.first)}`;
  const choose = () => state.set({ layer, step: finding.first, ...(finding.statistic ? { statistic: finding.statistic, stage: finding.stage, view: "map", from: "", to: "" } : {}) });
  return h("article", { class: `finding is-${finding.level}${finding.past ? " is-past" : ""}${isChosen ? " is-chosen" : ""}` },
    h("button", { type: "button", class: "head", onclick: choose, "data-key": `finding:${finding.place}`, title: "Show the layer at this step" },
      h("span", { class: "level" }, finding.past && finding.source === "monitor" ? "recovered" : finding.past ? "mended" : finding.level),
      h("span", { class: "title" }, finding.title),
      h("span", { class: "layer" }, breakable(finding.layers[0] || finding.where || "(the model)"), finding.layers.length > 1 ? ` and ${finding.layers.length - 1} more` : ""),
      h("span", { class: "muted" }, [`${span}${inStage(finding)}`, finding.text].filter(Boolean).join(": "))),
    finding.past || finding.level === "info" ? folded(finding, run.rules) : advice(finding, run.rules));
}

// Training is where findings are unless they say otherwise.
export const inStage = ({ stage }) => (stage && stage !== "train" ? `, in ${stageName(stage)}` : "");

// What is over, or harmless, takes less room.
function folded(finding, rules) {
  const what = advice(finding, rules);
  return what && h("details", { class: "folded" }, h("summary", { "data-key": `advice:${finding.place}` }, "What to do"), what);
}

// What to do: why it matters, code to copy, and where to read on.
export function advice(finding, rules = {}) {
  const fix = code(finding.fix);
  if (!fix.code && !fix.note && !finding.why && !finding.link) return null;
  const page = rules[finding.rule];
  return h("div", { class: "advice" },
    finding.why && h("p", {}, finding.why),
    fix.code && codeBlock(fix.code),
    fix.note && h("p", { class: "muted" }, fix.note),
    page ? h("details", { class: "rule" }, h("summary", { "data-key": `rule:${finding.rule}:${finding.layers[0]}` }, `Rule ${finding.rule}`), markdown(page)) : link(finding.link, finding.source === "guard" ? `Rule ${finding.code}` : "Read on"));
}
