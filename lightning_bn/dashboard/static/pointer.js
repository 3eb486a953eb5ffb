// The pointer over the map: it points, picks, and draws a range over the columns.
import { h } from "./dom.js";

const DRAG = 5; // points from which on a press is a brush and no click

// `at(event)` tells the cell below the pointer as [row, column].
export function follow(area, { at, hover, leave, pick, zoom, reset }) {
  const brush = h("div", { class: "brush", hidden: true });
  area.append(brush);
  let from = null;
  const across = (event) => {
    const box = area.getBoundingClientRect();
    return Math.max(0, Math.min(box.width, event.clientX - box.left));
  };
  const isBrush = (event) => from !== null && Math.abs(across(event) - from) >= DRAG;
  const drop = () => {
    from = null;
    brush.hidden = true;
  };
  area.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    from = across(event);
    area.setPointerCapture?.(event.pointerId);
  });
  area.addEventListener("pointermove", (event) => {
    if (!isBrush(event)) return hover(at(event));
    const [left, right] = [from, across(event)].sort((a, b) => a - b);
    Object.assign(brush.style, { left: `${left}px`, width: `${right - left}px` });
    brush.hidden = false;
    leave();
  });
  area.addEventListener("pointerup", (event) => {
    if (from === null) return;
    const [start, wasBrush] = [from, isBrush(event)];
    drop();
    if (!wasBrush) return pick(at(event));
    const { width } = area.getBoundingClientRect();
    zoom([start / width, across(event) / width].sort((a, b) => a - b));
  });
  area.addEventListener("pointercancel", drop);
  area.addEventListener("pointerleave", leave);
  area.addEventListener("dblclick", reset);
}
