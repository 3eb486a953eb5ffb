// Columns are thinned without losing a short illness; test_javascript.py compares this with Python's own thinning.
import assert from "node:assert/strict";
import test from "node:test";
import { flags, limitsOfRow, thinned, weight } from "../../lightning_bn/dashboard/static/thin.js";

const DEAD = { low: null, high: 0.25, healthy: 0, log: false };

const grid = (values, more = {}) => ({
  layers: values.map((_, row) => `layer${row}`), values, warming: values.map(() => []),
  first: values[0].map((_, at) => at * 10), last: values[0].map((_, at) => at * 10), rates: values[0].map(() => 0.1), ...more,
});

test("one sick sample of a hundred is in what is left, in the column that stands for it", () => {
  const values = Array(100).fill(0.1);
  values[57] = 0.9;
  const thin = thinned(grid([values]), 10, DEAD);
  assert.deepEqual(thin.values[0], [0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1]);
  assert.deepEqual([thin.first[5], thin.last[5]], [500, 590]);
});

test("a NaN comes before an infinite value, and what warms up after both", () => {
  assert.deepEqual(thinned(grid([[0.1, "inf", "nan", 0.9]]), 1, DEAD).values, [["nan"]]);
  const warm = thinned(grid([[0.9, 0.2]], { warming: [[[0, 0]]] }), 1, DEAD);
  assert.deepEqual([warm.values, warm.warming], [[[0.2]], [[]]]);
});

test("what has few enough columns stays as it is", () => {
  const whole = grid([[0.1, 0.2]]);
  assert.equal(thinned(whole, 2, DEAD), whole);
});

test("a layer for which the limits do not hold has none", () => {
  const whole = grid([[0.1], [0.9]], { unjudged: [1] });
  assert.deepEqual([0, 1].map((row) => limitsOfRow(whole, row, DEAD).high), [0.25, null]);
});

test("spans become flags", () => assert.deepEqual([...flags([[1, 2], [4, 4]], 6)], [0, 1, 1, 0, 1, 0]));

test("what warms up weighs next to nothing, but for NaN", () => {
  assert.ok(weight(0.9, 1, DEAD) < weight(0.1, 0, DEAD));
  assert.equal(weight("nan", 1, DEAD), weight("nan", 0, DEAD));
});
