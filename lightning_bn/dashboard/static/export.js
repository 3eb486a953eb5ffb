// The map as a picture and as a table.
import { download, h } from "./dom.js";
import { FONT, colours } from "./theme.js";
import { count } from "./format.js";
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
  const { map, statistic, grid, run } = page;
  const tall = Math.max(map.rowHeight(), 12);
  const [left, top, width, height] = [300, 46, 1000, Math.min(4000, map.rows.length * tall)];
  const canvas = h("canvas", { width: 1320, height: height + 90 });
  const context = canvas.getContext("2d");
  const { paper, text, missing } = colours();
  context.fillStyle = paper;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = missing;
  context.fillRect(left, top, width, height);
  context.imageSmoothingEnabled = false; // a cell is one colour
  context.drawImage(map.cells, left, top, width, height);
  const marks = h("canvas");
  if (paintMarks(marks, map.rows, map.columns, statistic, width, height)) context.drawImage(marks, left, top, width, height);
  const write = (words, x, y, align, size = 12) => {
    Object.assign(context, { fillStyle: text, textAlign: align, textBaseline: "middle", font: `${size}px ${FONT}` });
    context.fillText(words, x, y);
  };
  write(`${run.name}: ${statistic.label}, ${grid.stage}`, left, 22, "left", 15);
  map.rows.forEach((row, index) => write(shortened(row.kind === "group" ? `${row.name}.*` : row.layer), left - 8, top + ((index + 0.5) * height) / map.rows.length, "right"));
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    const column = Math.round(share * (map.columns - 1));
    write(count(map.grid.first[column]), left + ((column + 0.5) / map.columns) * width, top + height + 14, "center");
  }
  write("step", left + width / 2, top + height + 32, "center");
  download(fileName(page, "png"), await new Promise((resolve) => canvas.toBlob(resolve)));
}

const shortened = (name) => (name.length > 44 ? `…${name.slice(-43)}` : name || "(the model)");
