// As many columns as the screen has points for, each with every row's worst: as journal/grid.py has it.
import { badness } from "./format.js";

export function thinned(grid, columns, statistic) {
  const count = grid.first.length;
  if (count <= columns) return grid;
  const starts = Array.from({ length: columns }, (_, column) => Math.floor((column * count) / columns));
  const ends = [...starts.slice(1), count];
  const values = [];
  const warming = [];
  grid.layers.forEach((_, row) => {
    const limits = limitsOfRow(grid, row, statistic);
    const [own, warm] = [grid.values[row], flags(grid.warming[row], count)];
    const picks = starts.map((start, column) => worst(own, warm, start, ends[column], limits));
    values.push(picks.map((pick) => own[pick]));
    warming.push(spans(picks.map((pick) => warm[pick])));
  });
  return {
    ...grid, values, warming, first: starts.map((start) => grid.first[start]), last: ends.map((end) => grid.last[end - 1]),
    rates: starts.map((start) => grid.rates[start]),
  };
}

// The limits do not hold for every layer.
export function limitsOfRow(grid, row, statistic) {
  return grid.unjudged?.includes(row) ? { ...statistic, low: null, high: null } : statistic;
}

export function flags(spans, length) {
  const found = new Uint8Array(length);
  for (const [first, last] of spans || []) found.fill(1, first, last + 1);
  return found;
}

// What says nothing yet is worse than nothing, and no more; NaN is worst of all.
export function weight(value, isWarm, limits) {
  const bad = badness(value, limits);
  return isWarm && value !== "nan" ? Math.min(bad, 1e-3) : bad;
}

function worst(values, warm, start, end, limits) {
  let best = start;
  for (let at = start, most = -2; at < end; at++) {
    const bad = weight(values[at], warm[at], limits);
    if (bad <= most) continue;
    most = bad;
    best = at;
  }
  return best;
}

function spans(flags) {
  const found = [];
  flags.forEach((flag, at) => {
    if (!flag) return;
    const last = found[found.length - 1];
    if (last && last[1] === at - 1) last[1] = at;
    else found.push([at, at]);
  });
  return found;
}
