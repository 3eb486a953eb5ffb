// The rows of the map: filtered, sorted, and folded into groups by the prefix of their names.
import assert from "node:assert/strict";
import test from "node:test";
import { makeRows, matches } from "../../lightning_bn/dashboard/static/rows.js";

const DEAD = { low: null, high: 0.25, healthy: 0, log: false };
const OPTIONS = { filter: "", sick: false, sort: "forward", open: new Set(), fold: new Set() };

const grid = (rows) => ({
  layers: Object.keys(rows), values: Object.values(rows), warming: Object.values(rows).map(() => []), first: [0, 10], last: [0, 10],
});
const rowsOf = (rows, options = {}) => makeRows(grid(rows), DEAD, { ...OPTIONS, ...options });

test("a pattern is a part of a name, or has stars, whatever the case", () => {
  assert.ok(matches("layer4.0.bn1", "BN1") && matches("layer4.0.bn1", "layer4.*") && matches("layer4.0.bn1", "*.bn?"));
  assert.ok(!matches("layer4.0.bn1", "*.bn") && !matches("layer40", "layer4.*"));
});

test("layers that share a prefix are a group that shows its worst layer at each step", () => {
  const [group, ...leaves] = rowsOf({ "a.0": [0.1, 0.2], "a.1": [0.9, 0.0], b: [0, 0] });
  assert.deepEqual([group.kind, group.name, group.size, group.sick, group.firstSick], ["group", "a", 2, 1, 0]);
  assert.deepEqual([group.values, group.from], [[0.9, 0.2], ["a.1", "a.0"]]);
  assert.deepEqual(leaves.map((each) => [each.name, each.label, each.depth]), [["a.0", "0", 1], ["a.1", "1", 1], ["b", "b", 0]]);
});

test("a folded group hides its layers", () => {
  const rows = { "a.0": [0, 0], "a.1": [0, 0], b: [0, 0] };
  assert.deepEqual(rowsOf(rows, { fold: new Set(["a"]) }).map((each) => each.name), ["a", "b"]);
});

test("of more than forty layers the groups are folded until they are opened", () => {
  const rows = Object.fromEntries([...Array(60).keys()].map((n) => [`s${n % 2 ? 1 : 0}.${n}`, [0, 0]]).sort());
  assert.deepEqual(rowsOf(rows).map((each) => each.name), ["s0", "s1"]);
  assert.equal(rowsOf(rows, { open: new Set(["s1"]) }).length, 32);
});

test("of many layers the groups that hold the first sick one are open, so that it has a row", () => {
  const names = [...Array(60).keys()].map((n) => `s${Math.floor(n / 20)}.b${Math.floor(n / 5) % 4}.${n % 5}`);
  const rows = Object.fromEntries(names.map((name) => [name, name === "s1.b2.3" ? [0, 1] : name === "s2.b0.0" ? [0, 0.3] : [0, 0]]));
  const open = [...[0, 1, 2, 3, 4].map((n) => `s1.b2.${n}`)];
  assert.deepEqual(rowsOf(rows).map((each) => each.name), ["s0", "s1", "s1.b0", "s1.b1", "s1.b2", ...open, "s1.b3", "s2"]);
  assert.deepEqual(rowsOf(rows, { fold: new Set(["s1"]) }).map((each) => each.name), ["s0", "s1", "s2"]);
});

test("a group that is the only one beside single layers is open, and so on inside, down to several groups", () => {
  const names = ["input", ...[...Array(60).keys()].map((n) => `model.net.s${n < 30 ? 0 : 1}.${n}`)];
  const rows = Object.fromEntries(names.map((name) => [name, [0, 0]]));
  assert.deepEqual(rowsOf(rows).map((each) => each.name), ["input", "model.net", "model.net.s0", "model.net.s1"]);
  const block = Object.fromEntries([...names, "model.stem"].map((name) => [name, [0, 0]]));
  assert.deepEqual(rowsOf(block).map((each) => each.name), ["input", "model", "model.net", "model.net.s0", "model.net.s1", "model.stem"]);
  assert.deepEqual(rowsOf(rows, { fold: new Set(["model.net"]) }).map((each) => each.name), ["input", "model.net"]);
});

test("sorted by the first illness, the healthy come last; by the worst value, the sickest first", () => {
  const rows = { a: [0, 0], b: [0, 0.5], c: [0.3, 0] };
  assert.deepEqual(rowsOf(rows, { sort: "first" }).map((each) => each.name), ["c", "b", "a"]);
  assert.deepEqual(rowsOf(rows, { sort: "worst" }).map((each) => each.name), ["b", "c", "a"]);
  assert.deepEqual(rowsOf(rows, { sick: true }).map((each) => each.name), ["b", "c"]);
});
