// Numbers and limits in words.

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

export function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === "nan") return "NaN";
  if (value === "inf") return "infinite";
  if (value === "-inf") return "minus infinite";
  if (!isNumber(value)) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

export const count = (value) => (isNumber(value) ? value.toLocaleString("en-US") : "–");

export const plural = (amount, what) => `${count(amount)} ${what}${amount === 1 ? "" : "s"}`;

// A value against the limits of its statistic, in plain words.
export function against(value, statistic) {
  if (value === null || value === undefined) return "no value";
  if (!isNumber(value)) return `${number(value)}: not finite`;
  const { low, high } = statistic;
  if (isNumber(high) && value > high) return high === 0 ? "should be none" : `above the limit of ${number(high)}`;
  if (isNumber(low) && value < low) return `below the limit of ${number(low)}`;
  if (isNumber(low) && isNumber(high)) return `within ${number(low)} to ${number(high)}`;
  return isNumber(high) ? `limit ${number(high)}` : "no limit";
}

export function isSick(value, statistic) {
  if (value === "nan" || value === "inf" || value === "-inf") return isNumber(statistic.high) || isNumber(statistic.low);
  return isNumber(value) && ((isNumber(statistic.high) && value > statistic.high) || (isNumber(statistic.low) && value < statistic.low));
}

// How bad a value is, to tell the worst of several: as journal/grid.py has it.
export function badness(value, statistic) {
  if (value === null || value === undefined) return -1;
  if (value === "nan") return 3e6;
  if (!isNumber(value)) return 2e6;
  const healthy = isNumber(statistic.healthy) ? statistic.healthy : statistic.log ? 1 : 0;
  const distance = statistic.log ? Math.abs(Math.log(Math.max(value, 1e-38) / (healthy || 1))) : Math.abs(value - healthy);
  return Math.min(distance, 5e5) + (isSick(value, statistic) ? 1e6 : 0);
}

// The place of a value on the scale of colours.
export function place(value, scale) {
  if (!isNumber(value)) return null;
  if (!scale || !scale.log) return value;
  if (value <= 0) return scale.count ? scale.low : scale.low - 0.01;
  return Math.log10(value);
}

// plotly reads markup in text; names are not markup.
export const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

export function when(seconds) {
  return seconds ? new Date(seconds * 1000).toLocaleString() : "";
}

export function code(fix) {
  if (!fix) return { code: "", note: "" };
  if (typeof fix === "string") return { code: fix, note: "" };
  const isAdvice = fix.place === "advice";
  const note = [isAdvice ? "" : fix.place, fix.note].filter(Boolean).join("; ");
  return isAdvice ? { code: "", note: [fix.code, fix.note].filter(Boolean).join("; ") } : { code: fix.code || "", note };
}
