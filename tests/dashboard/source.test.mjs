// Where the page's data come from: a server's answers, or parts of the file.
import assert from "node:assert/strict";
import { gzipSync } from "node:zlib";
import test from "node:test";
import { embeddedSource, servedSource } from "../../lightning_bn/dashboard/static/source.js";

const GRID = {
  statistic: "std", stage: "train", layers: ["a", "b"], first: [0, 10, 20], last: [0, 10, 20], rates: [1, 1, 1], samples: 3,
  values: [[1, 2, 3], [4, 5, 6]], warming: [[[0, 1]], []],
};

function embedded(parts) {
  const scripts = Object.entries(parts).map(([name, value]) => ({ dataset: { part: name }, textContent: gzipSync(JSON.stringify(value)).toString("base64") }));
  globalThis.document = { querySelectorAll: () => scripts };
  return embeddedSource();
}

test("a question leaves out what is empty, and an error of the server's is one here", async () => {
  const asked = [];
  globalThis.fetch = async (address) => (asked.push(String(address)), { ok: asked.length === 1, status: 404, statusText: "Not Found", json: async () => (asked.length === 1 ? GRID : { error: "There is no such run." }) });
  const source = servedSource("http://host/data/plugin/lightning_bn/index.js");
  assert.deepEqual(await source.grid("r/1", "std", "train", "", undefined), GRID);
  assert.equal(asked[0], "http://host/data/plugin/lightning_bn/data/grid?run=r%2F1&statistic=std&stage=train");
  await assert.rejects(source.run("none"), /There is no such run/);
});

test("a zoom into a file's grid takes columns, values and warm-up along", async () => {
  const part = await embedded({ "grid/train/std/run": GRID }).grid("run", "std", "train", 10, 20);
  assert.deepEqual([part.first, part.values, part.warming], [[10, 20], [[2, 3], [5, 6]], [[[0, 0]], []]]);
});

test("a layer's statistics come from the grids of the file", async () => {
  const source = embedded({ "run/run": { statistics: [{ name: "std", stages: ["train", "val"] }] }, "grid/train/std/run": GRID });
  assert.deepEqual(await source.layer("run", "b"), { std: { train: { steps: [0, 10, 20], values: [4, 5, 6], warming: [] } } });
});
