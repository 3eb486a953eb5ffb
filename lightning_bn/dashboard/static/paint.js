// The colours of the map: a canvas with one point a cell, which the browser stretches.
import { place } from "./format.js";
import { colours } from "./theme.js";

const SHADES = 1024;

// The colours of a statistic, from the least to the greatest of its scale.
export function ramp(statistic) {
  const { both, rising } = colours();
  return statistic.low != null && statistic.scale?.colours !== "viridis" ? both : rising;
}

export function paintCells(canvas, rows, columns, statistic) {
  const scale = statistic.scale || rangeOf(rows);
  const shades = table(ramp(statistic));
  const last = SHADES - 1;
  const picture = new ImageData(Math.max(1, columns), Math.max(1, rows.length));
  const points = new Uint32Array(picture.data.buffer);
  rows.forEach((row, index) => {
    for (let column = 0; column < columns; column++) {
      const value = row.values[column];
      const at = value === "inf" ? Infinity : value === "-inf" ? -Infinity : place(value, scale);
      if (at === null) continue; // transparent; a mark tells why
      const share = scale.high > scale.low ? (at - scale.low) / (scale.high - scale.low) : 0.5;
      points[index * columns + column] = shades[Math.round(Math.max(0, Math.min(1, share)) * last)];
    }
  });
  canvas.width = picture.width;
  canvas.height = picture.height;
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

// A statistic without a scale of its own is drawn between its least and its greatest value.
function rangeOf(rows) {
  let [low, high] = [Infinity, -Infinity];
  for (const row of rows) {
    for (const value of row.values) {
      if (!Number.isFinite(value)) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  }
  return { low, high, log: false };
}

// Every shade as the four bytes that a canvas has of a point.
function table(stops) {
  const bytes = new Uint8ClampedArray(SHADES * 4);
  const parsed = stops.map(([at, colour]) => [at, [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16))]);
  for (let shade = 0, next = 1; shade < SHADES; shade++) {
    const at = shade / (SHADES - 1);
    while (next < parsed.length - 1 && parsed[next][0] < at) next++;
    const [[start, from], [end, to]] = [parsed[next - 1], parsed[next]];
    const share = (at - start) / (end - start);
    bytes.set([...from.map((each, index) => each + share * (to[index] - each)), 255], shade * 4);
  }
  return new Uint32Array(bytes.buffer);
}
