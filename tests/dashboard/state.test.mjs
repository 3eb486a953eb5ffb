// What is selected is in the address, in both of the page's homes.
import assert from "node:assert/strict";
import test from "node:test";
import { State, tensorboardAddress } from "../../lightning_bn/dashboard/static/state.js";

function host(hash) {
  const found = { location: { hash }, history: { state: 1, replaceState: (_state, _title, address) => (found.location.hash = address) } };
  found.addEventListener = (_event, listener) => (found.changed = listener);
  return found;
}

test("a selection is written behind the tab's name and what others wrote, and read again", () => {
  const window = host("#lightning_bn&p.scalars.x=1");
  new State(tensorboardAddress("lightning_bn", window)).set({ layer: "net.1 [64]", step: 40 });
  assert.equal(window.location.hash, "#lightning_bn&p.scalars.x=1&p.lightning_bn.layer=net.1%20%5B64%5D&p.lightning_bn.step=40");
  const again = new State(tensorboardAddress("lightning_bn", window));
  assert.deepEqual([again.get("layer"), again.get("step"), again.get("view")], ["net.1 [64]", "40", "map"]);
});

test("several values are one change, and one that changes nothing is none", () => {
  const told = [];
  const state = new State(tensorboardAddress("lightning_bn", host("")));
  state.listen((changed) => told.push([...changed].sort()));
  state.set({ layer: "a", step: 1 });
  state.set({ layer: "a", step: "1" });
  assert.deepEqual(told, [["layer", "step"]]);
});

test("an address that others change is followed, and a value that is none of the page's is left out", () => {
  const window = host("");
  const state = new State(tensorboardAddress("lightning_bn", window));
  window.location.hash = "#lightning_bn&p.lightning_bn.layer=b&p.lightning_bn.evil=1";
  window.changed();
  assert.equal(state.get("layer"), "b");
  assert.equal(state.get("evil"), undefined);
});
