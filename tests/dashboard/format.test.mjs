// Numbers and limits in words.
import assert from "node:assert/strict";
import test from "node:test";
import { against, badness, code, fitted, inWords, isSick, number, ofLimit, place, plain, plural, spacing, stageName, wrapped } from "../../lightning_bn/dashboard/static/format.js";

const DEAD = { low: null, high: 0.25, healthy: 0, log: false };
const SPREAD = { low: 1e-7, high: 1e3, healthy: 1, log: true };

test("a number has four digits, an exponent where it is tiny or huge, and a word where it is none", () => {
  assert.deepEqual([1 / 3, 0, 1e-4, 2.5e6, 123456, null, "nan", "-inf"].map(number),
    ["0.3333", "0", "1e-4", "2.5e+6", "123500", "–", "NaN", "minus infinite"]);
});

test("one is singular, and thousands have commas", () => {
  assert.deepEqual([plural(1, "layer"), plural(0, "layer"), plural(1200, "layer")], ["1 layer", "0 layers", "1,200 layers"]);
});

test("a value is sick beyond either limit, not at it, and where it is not finite; one that is missing is not", () => {
  assert.deepEqual([0.25, 0.26, "nan", "inf", null].map((value) => isSick(value, DEAD)), [false, true, true, true, false]);
  assert.deepEqual([1e-8, 1, 1001].map((value) => isSick(value, SPREAD)), [true, false, true]);
  assert.equal(isSick("nan", { low: null, high: null }), false);
});

test("NaN is worse than infinite, infinite than sick, sick than healthy, and any value than none", () => {
  const order = ["nan", "inf", 0.3, 0.2, 0, null].map((value) => badness(value, DEAD));
  assert.deepEqual(order, [...order].sort((a, b) => b - a));
  assert.equal(new Set(order).size, order.length);
});

test("on a logarithm, a tenth is as far from 1 as ten is", () => {
  assert.ok(Math.abs(badness(0.1, SPREAD) - badness(10, SPREAD)) < 1e-12);
});

test("a limit is told in words, and a limit of 0 as none", () => {
  assert.equal(against(0.3, DEAD), "above the limit of 0.25");
  assert.equal(against(1e-9, SPREAD), "below the limit of 1e-7");
  assert.equal(against(1, { high: 0 }), "should be none");
  assert.equal(against(null, DEAD), "no value");
});

test("a zero has a place below the decades, and at the low end of a count", () => {
  assert.equal(place(100, { log: true, low: -3 }), 2);
  assert.equal(place(0, { log: true, low: -3 }), -3.01);
  assert.equal(place(0, { log: true, low: -6, count: true }), -6);
  assert.equal(place("nan", { log: true }), null);
});

test("a name is no markup", () => assert.equal(plain("<b>&"), "&lt;b&gt;&amp;"));

test("a fix that is advice is no code", () => {
  assert.deepEqual(code({ code: "warm up", place: "advice", note: "" }), { code: "", note: "warm up" });
  assert.deepEqual(code({ code: "f()", place: "before fit", note: "once" }), { code: "f()", note: "before fit; once" });
});

test("a scale of counts ends just above the largest of them, other scales stay", () => {
  const scale = { low: -1, high: 3, log: true, count: true };
  const ends = [[[0, 3], [null, "nan"]], [[11, 1]], [[32]], [[64]], [[4000]], []].map((rows) => Math.round(10 ** fitted(scale, rows).high));
  assert.deepEqual(ends, [10, 20, 50, 100, 1000, 10]);
  const other = { low: 0, high: 1, log: false };
  assert.equal(fitted(other, [[0.1]]), other);
  assert.equal(fitted(null, [[1]]), null);
});

test("a share of a limit is told up to it, and no thousands of percent beyond", () => {
  assert.deepEqual([0.614, 0.999, 1, 10].map(ofLimit), ["61 %", "100 %", "beyond", "beyond"]);
});

test("samples that are not evenly apart are said to be so", () => {
  assert.equal(spacing([0, 10, 20, 30]), "");
  assert.equal(spacing([7]), "");
  assert.match(spacing([0, 1, 2, 6, 10]), /1 to 4 steps apart/);
});

test("a series in words has its ends, its reach and what is beyond the limits", () => {
  const words = inWords("dead", { train: { steps: [0, 10, 1200], values: [0, 0.5, "nan"] }, val: { steps: [5], values: [null] } }, DEAD);
  assert.equal(words, "dead. train: 0 at step 0, NaN at step 1,200, least 0, most 0.5, 2 of 3 beyond the limits; val: no finite value.");
});

test("a text is broken between words, none of which is cut", () => {
  assert.deepEqual(wrapped("share of channels that are dead", 18), ["share of channels", "that are dead"]);
  assert.deepEqual(wrapped("normalisation, short", 5), ["normalisation,", "short"]);
  assert.deepEqual(wrapped("mean", 60), ["mean"]);
});

test("a stage has the word that people use, whoever named it", () => {
  assert.deepEqual(["train", "val", "validate", "other"].map(stageName), ["training", "validation", "validation", "other"]);
});
