// Where the page's data come from: TensorBoard's plugin, or the file that the page is.

export function servedSource(base) {
  const ask = async (route, values = {}) => {
    const query = new URLSearchParams(Object.entries(values).filter(([, value]) => value !== undefined && value !== ""));
    const answer = await fetch(new URL(`./data/${route}?${query}`, base), { credentials: "same-origin" });
    const content = await answer.json().catch(() => ({ error: `${answer.status} ${answer.statusText}` }));
    if (!answer.ok) throw new Error(content.error || `${answer.status} ${answer.statusText}`);
    return content;
  };
  return {
    live: true,
    runs: () => ask("runs"),
    run: (run, revision) => ask("run", { run, revision }),
    grid: (run, statistic, stage, first, last) => ask("grid", { run, statistic, stage, first, last }),
    layer: (run, layer) => ask("layer", { run, layer }),
    channels: (run, layer) => ask("channels", { run, layer }),
    summaries: () => ask("summaries"),
  };
}

// Parts of the file, each compressed by itself and opened when it is asked for.
export function embeddedSource() {
  const opened = new Map();
  const part = (name) => {
    if (!opened.has(name)) opened.set(name, open(name));
    return opened.get(name);
  };
  const grid = async (run, statistic, stage, first, last) => {
    const whole = await part(`grid/${stage}/${statistic}/${run}`);
    return whole ? within(whole, first, last) : { statistic, stage, layers: [], first: [], last: [], values: [], warming: [], rates: [], samples: 0 };
  };
  return {
    live: false,
    runs: () => part("runs"),
    run: (run) => part(`run/${run}`),
    grid,
    layer: async (run, layer) => layerFrom(await part(`run/${run}`), layer, (statistic, stage) => grid(run, statistic, stage)),
    channels: async (run, layer) => {
      const all = (await part(`channels/${run}`)) || { channels: [], histograms: [], edges: [] };
      const own = (events) => events.filter((each) => layer in each.layers).map((each) => ({ ...each, ...each.layers[layer] }));
      return { channels: own(all.channels), histograms: own(all.histograms), edges: all.edges };
    },
    summaries: () => part("summaries"),
  };
}

async function open(name) {
  const holder = [...document.querySelectorAll("script[data-part]")].find((each) => each.dataset.part === name);
  if (!holder) return null;
  const bytes = Uint8Array.from(atob(holder.textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function within(grid, first, last) {
  if (first === undefined || first === "") return grid;
  const kept = grid.first.map((_, index) => index).filter((index) => grid.last[index] >= first && grid.first[index] <= last);
  const pick = (list) => kept.map((index) => list[index]);
  const start = kept[0] ?? 0;
  const spans = (list) => list.map(([a, b]) => [Math.max(a - start, 0), Math.min(b - start, kept.length - 1)]).filter(([a, b]) => a <= b);
  return { ...grid, first: pick(grid.first), last: pick(grid.last), rates: pick(grid.rates), values: grid.values.map(pick), warming: grid.warming.map(spans) };
}

async function layerFrom(run, layer, grid) {
  const found = {};
  for (const statistic of run.statistics) {
    for (const stage of statistic.stages) {
      const whole = await grid(statistic.name, stage);
      const row = whole.layers.indexOf(layer);
      if (row < 0) continue;
      found[statistic.name] ??= {};
      found[statistic.name][stage] = { steps: whole.first, values: whole.values[row], warming: whole.warming[row] };
    }
  }
  return found;
}
