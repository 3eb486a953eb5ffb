// Which of several runs needs to be looked at.
import assert from "node:assert/strict";
import test from "node:test";
import { entry, neediest } from "../../lightning_bn/dashboard/static/runs.js";

const HEALTHY = { name: "a", level: "healthy", sick: 0, guard: 0, recovered: 0, changed: 9 };
const PAST = { name: "b", level: "past", sick: 0, guard: 0, recovered: 2, changed: 8 };
const WARNED = { name: "c", level: "warning", sick: 0, guard: 1, recovered: 1, changed: 7 };
const OLD = { name: "d", level: "error", sick: 3, guard: 1, recovered: 0, changed: 5 };
const NEW = { name: "e", level: "error", sick: 1, guard: 0, recovered: 0, changed: 6 };

test("the worst verdict comes first, and of two as bad the newer run", () => {
  const order = [];
  for (let left = [HEALTHY, PAST, WARNED, OLD, NEW]; left.length; left = left.filter((each) => !order.includes(each.name))) order.push(neediest(left));
  assert.deepEqual(order, ["e", "d", "c", "b", "a"]);
});

test("a run that can't be read needs nobody, and of no run there is none", () => {
  assert.equal(neediest([{ name: "broken", verdict: "can't be read" }, PAST]), "b");
  assert.equal(neediest([]), undefined);
});

test("the list of runs says what is wrong with each", () => {
  assert.deepEqual([HEALTHY, PAST, WARNED, OLD, NEW].map((each) => entry(each.name, each)[1]),
    ["a", "b: recovered", "c: 1 mistake", "d: 3 layers sick", "e: 1 layer sick"]);
  assert.deepEqual(entry("new", undefined), ["new", "new"]);
});
