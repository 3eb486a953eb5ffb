// The channels of a layer: sorted, the dead and the drifting ones marked; its histogram over time.
import { h, replace } from "./dom.js";
import { count, isNumber, plural } from "./format.js";
import { axis, colours, drawChart, stepAxis } from "./theme.js";

const DRIFT = 1; // running standard deviations, or log ratio: the monitor's limits

export function drawChannels(holder, { channels, histograms, edges }, width, step) {
  const trained = channels.filter((each) => each.stage === "train");
  const sample = nearest(trained.length ? trained : channels, step);
  const plot = h("div", { class: "plot" });
  const over = h("div", { class: "plot" });
  const isEmpty = !sample || !(sample.std || sample.mean);
  const isDrawn = !isEmpty && [...(sample.std ?? []), ...(sample.mean ?? [])].some(isNumber);
  replace(holder,
    isEmpty ? null : h("h3", {}, `Channels, step ${count(sample.step)}`), isEmpty ? null : h("p", { class: "muted" }, words(sample)), isDrawn ? plot : null,
    histograms.length ? h("h3", {}, "Histogram over time") : null, histograms.length ? over : null);
  if (isDrawn) drawSorted(plot, sample, width);
  if (histograms.length) drawHistogram(over, histograms, edges, width);
}

function nearest(samples, step) {
  if (!samples.length) return null;
  if (step === "") return samples[samples.length - 1];
  return samples.reduce((best, each) => (Math.abs(each.step - step) < Math.abs(best.step - step) ? each : best));
}

const deadOf = (sample) => new Set(sample.dead || []);
const driftingOf = (sample) => new Set((sample.std || sample.mean).map((_, index) => index).filter((index) => ["drift_mean", "drift_var"].some((name) => Math.abs(sample[name]?.[index] ?? 0) > DRIFT)));

function words(sample) {
  const amount = (sample.std || sample.mean).length;
  if (![...(sample.std ?? []), ...(sample.mean ?? [])].some(isNumber)) return `${plural(amount, "channel")}, none with a finite value`;
  return `${plural(amount, "channel")}, ${deadOf(sample).size} dead${sample.drift_mean || sample.drift_var ? `, ${driftingOf(sample).size} drifting` : ""}; sorted by standard deviation`;
}

function drawSorted(plot, sample, width) {
  const colour = colours();
  const [dead, drifting] = [deadOf(sample), driftingOf(sample)];
  const size = (sample.std || sample.mean).length;
  const order = Array.from({ length: size }, (_, index) => index).sort((a, b) => (sample.std?.[a] ?? 0) - (sample.std?.[b] ?? 0));
  const shade = order.map((channel) => (dead.has(channel) ? colour.nan : drifting.has(channel) ? colour.sick : colour.series[0]));
  const symbol = order.map((channel) => (dead.has(channel) ? "x" : drifting.has(channel) ? "diamond" : "circle"));
  const border = order.map((channel) => (dead.has(channel) ? colour.text : shade[0]));
  const trace = (name, axis, fields) => ({
    type: "scatter", mode: "markers", cliponaxis: false, x: order.map((_, index) => index), y: order.map((channel) => (isNumber(fields?.[channel]) ? fields[channel] : null)), yaxis: axis, name,
    text: order.map((channel) => `channel ${channel}${dead.has(channel) ? ", dead" : ""}${drifting.has(channel) ? ", drifting" : ""}`), hovertemplate: "%{text}: %{y:.4g}<extra></extra>",
    marker: { size: size > 200 ? 3 : 6, color: shade, symbol, line: { width: 1, color: border } },
  });
  drawChart(plot, `Standard deviation and mean of each channel at step ${count(sample.step)}: ${words(sample)}.`, [trace("standard deviation", "y", sample.std), trace("mean", "y2", sample.mean)], {
    width, height: 190, margin: { l: 48, r: 6, t: 4, b: 22 }, xaxis: axis({ fixedrange: true, anchor: "y2" }),
    yaxis: axis({ domain: [0.54, 1], rangemode: "nonnegative", fixedrange: true, nticks: 4, title: { text: "std", font: { size: 11 } } }), yaxis2: axis({ domain: [0, 0.46], fixedrange: true, nticks: 4, title: { text: "mean", font: { size: 11 } } }),
  });
}

function drawHistogram(plot, histograms, edges, width) {
  const shares = histograms.map(({ counts }) => {
    const total = counts.reduce((sum, each) => sum + each, 0) || 1;
    return counts.map((each) => each / total);
  });
  const labels = shares[0].map((_, index) => (index === 0 ? `< ${edges[0] ?? ""}` : index === shares[0].length - 1 ? `> ${edges[index - 1] ?? ""}` : String(edges[index] ?? index)));
  const z = labels.map((_, bucket) => shares.map((share) => Math.sqrt(share[bucket] ?? 0)));
  const told = `Histogram of the activations at ${plural(histograms.length, "sample")}, steps ${count(histograms[0].step)} to ${count(histograms[histograms.length - 1].step)}.`;
  drawChart(plot, told, [{ type: "heatmap", z, x: histograms.map((each) => count(each.step)), y: labels, showscale: false, colorscale: colours().rising, hovertemplate: "step %{x}, %{y}<extra></extra>" }], {
    width, height: 200, margin: { l: 56, r: 6, t: 4, b: 36 }, xaxis: stepAxis({ type: "category", nticks: 5 }), yaxis: axis({ type: "category", fixedrange: true, nticks: 6 }),
  });
}
