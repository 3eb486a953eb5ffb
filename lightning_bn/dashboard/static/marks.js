// What the map shows besides its colours: beyond a limit, warming up, NaN, missing. Painted once over the heat map.
import { isSick } from "./format.js";
import { colours } from "./theme.js";

export const NONE = 0, SICK = 1, WARM = 2, NAN = 3, MISSING = 4;

export function markOf(value, warm, statistic) {
  if (value === null || value === undefined) return MISSING;
  if (value === "nan") return NAN;
  if (warm) return WARM;
  return isSick(value, statistic) ? SICK : NONE;
}

const NO_LIMITS = { low: null, high: null };

// The limits do not hold for every layer.
export function limitsOf(row, column, statistic) {
  if (row.kind === "group") return row.judged[column] ? statistic : NO_LIMITS;
  return row.statistic;
}

// Paints over a canvas as large as the map; returns whether there was anything to mark.
export function paintMarks(canvas, rows, columns, statistic, width, height) {
  const marks = rows.map((row) => Uint8Array.from({ length: columns }, (_, c) => markOf(row.values[c], row.warm[c], limitsOf(row, c, statistic))));
  canvas.width = canvas.height = 1; // clears it
  if (!marks.some((row) => row.some((mark) => mark !== NONE))) return false;
  const scale = height * width > 4e6 ? 1 : Math.min(window.devicePixelRatio || 1, 2);
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  const fills = patterns(context, scale);
  const across = canvas.width / columns;
  const down = canvas.height / rows.length;
  marks.forEach((row, index) => {
    for (let start = 0; start < columns; ) {
      let stop = start + 1;
      while (stop < columns && row[stop] === row[start]) stop++;
      if (row[start] !== NONE) {
        context.fillStyle = fills[row[start]];
        context.fillRect(start * across, index * down, (stop - start) * across, down);
      }
      start = stop;
    }
  });
  return true;
}

// The patterns run on over cells, so that they can be told apart where a cell is one point wide.
function patterns(context, scale) {
  const { missing, nan, muted } = colours();
  return {
    [SICK]: tile(context, scale, 6, (tile) => {
      tile.fillStyle = "rgba(0,0,0,0.75)";
      tile.fillRect(1, 1, 2.2, 2.2);
      tile.fillStyle = "rgba(255,255,255,0.9)";
      tile.fillRect(3.2, 3.2, 1, 1);
    }),
    [WARM]: tile(context, scale, 6, (tile, size) => {
      tile.strokeStyle = muted;
      tile.lineWidth = 1;
      for (const shift of [-size, 0, size]) {
        tile.beginPath();
        tile.moveTo(shift, size);
        tile.lineTo(shift + size, 0);
        tile.stroke();
      }
    }),
    [NAN]: nan,
    [MISSING]: missing,
  };
}

function tile(context, scale, size, draw) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = Math.round(size * scale);
  const inside = canvas.getContext("2d");
  inside.scale(canvas.width / size, canvas.height / size);
  draw(inside, size);
  return context.createPattern(canvas, "repeat");
}
