// Numbers and limits in words.

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

export function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === "nan") return "NaN";
  if (value === "inf") return "infinite";
  if (value === "-inf") return "minus infinite";
  if (!isNumber(value)) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}

export const count = (value) => (isNumber(value) ? value.toLocaleString("en-US") : "–");

export const plural = (amount, what) => `${count(amount)} ${what}${amount === 1 ? "" : "s"}`;

const STAGES = { train: "training", val: "validation", validate: "validation", test: "test", predict: "prediction", sanity_check: "the sanity check" };
export const stageName = (stage) => STAGES[stage] ?? stage;

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

// How much of the way to a limit is used. There is no way to a limit of 0, and none beyond a limit.
export const ofLimit = (used) => (used >= 1 ? "beyond" : `${Math.round(used * 100)} %`);

// A scale of counts ends at the largest of them, rounded up to 1, 2 or 5 times a power of ten: a layer of 16 channels
// shows in the same colours as one of 1,024.
export function fitted(scale, rows) {
  if (!scale?.count) return scale;
  let most = 10;
  for (const row of rows) for (const value of row) if (isNumber(value)) most = Math.max(most, value);
  const power = 10 ** Math.floor(Math.log10(most));
  const end = [1, 2, 5, 10].find((each) => each * power >= most) * power;
  return { ...scale, high: Math.min(scale.high, Math.log10(end)) };
}

// How far apart the samples are, in words, where they are not evenly so: the columns of the map are as wide as each other.
export function spacing(steps) {
  const gaps = steps.slice(1).map((step, place) => step - steps[place]);
  const [least, most] = [Math.min(...gaps), Math.max(...gaps)];
  return gaps.length && most > 1.5 * least ? `uneven: samples are ${count(least)} to ${count(most)} steps apart, and columns are equally wide` : "";
}

// A series in words, for who can't see its chart.
export function inWords(label, stages, statistic = {}) {
  const told = Object.entries(stages).map(([stage, { steps, values }]) => {
    const known = values.filter(isNumber);
    if (!known.length) return `${stage}: no finite value`;
    const beyond = values.filter((value) => isSick(value, statistic)).length;
    return `${stage}: ${number(values[0])} at step ${count(steps[0])}, ${number(values[values.length - 1])} at step ${count(steps[steps.length - 1])}, ` +
      `least ${number(Math.min(...known))}, most ${number(Math.max(...known))}${beyond ? `, ${beyond} of ${values.length} beyond the limits` : ""}`;
  });
  return `${label}. ${told.join("; ")}.`;
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

// The lines of a text, broken between words.
export function wrapped(text, letters) {
  const lines = [""];
  for (const word of text.split(" ")) {
    const longer = [lines[lines.length - 1], word].filter(Boolean).join(" ");
    if (longer.length <= letters || lines[lines.length - 1] === "") lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines;
}
