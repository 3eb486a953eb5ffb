// The map as a picture and as a table.
import { download } from "./dom.js";
import { colours, layout, axis } from "./theme.js";
import { count, place, plain } from "./format.js";
import { paintMarks } from "./marks.js";

export function csv(grid) {
  const cell = (value) => (value === null || value === undefined ? "" : /[",\n\r]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  const head = ["layer", ...grid.first.map((first, column) => (first === grid.last[column] ? first : `${first}-${grid.last[column]}`))];
  return [head, ...grid.layers.map((name, row) => [name, ...grid.values[row]])].map((line) => line.map(cell).join(",")).join("\r\n");
}

const fileName = (page, end) => `${page.run.name}-${page.statistic.name}-${page.state.get("stage")}.${end}`.replace(/[^\w.-]+/g, "_");

export function saveCsv(page) {
  download(fileName(page, "csv"), new Blob([csv(page.grid)], { type: "text/csv" }));
}

// The rows as they are shown, with their names, under a title.
export async function savePng(page) {
  const { rows, columns } = page.map;
  const { statistic, grid, run } = page;
  const colour = colours();
  const height = Math.min(4000, rows.length * Math.max(page.map.rowHeight(), 12));
  const picture = paintMarks(rows, columns, statistic, 1000, height);
  const scale = statistic.scale || {};
  const places = [0, 1, 2, 3, 4].map((each) => Math.round((each * (columns - 1)) / 4));
  const trace = { type: "heatmap", z: rows.map((row) => row.values.map((value) => place(value, statistic.scale))), colorscale: statistic.low != null ? colour.both : colour.rising, zmin: scale.low, zmax: scale.high, showscale: false };
  const shorten = (name) => plain(name.length > 44 ? `…${name.slice(-43)}` : name || "(the model)");
  const made = await window.Plotly.toImage({ data: [trace], layout: layout({
    width: 1320, height: height + 90, margin: { l: 300, r: 20, t: 46, b: 44 }, title: { text: plain(`${run.name}: ${statistic.label}, ${page.state.get("stage")}`), font: { size: 15 } },
    images: picture ? [{ source: picture, xref: "paper", yref: "paper", x: 0, y: 1, sizex: 1, sizey: 1, sizing: "stretch", layer: "above" }] : [],
    xaxis: axis({ tickvals: places, ticktext: places.map((each) => count(grid.first[each])), title: { text: "step" } }),
    yaxis: axis({ autorange: "reversed", tickvals: rows.map((_, index) => index), ticktext: rows.map((row) => shorten(row.kind === "group" ? `${row.name}.*` : row.layer)) }),
  }) }, { format: "png", width: 1320, height: height + 90 });
  download(fileName(page, "png"), await (await blobOf(made)));
}

// Not by fetch: the policy of the page allows no address but its own.
async function blobOf(address) {
  const [head, body] = address.split(",");
  const bytes = Uint8Array.from(atob(body), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: /data:([^;]+)/.exec(head)[1] });
}
