// A table whose columns sort.
import { h, replace } from "./dom.js";
import { isNumber, number } from "./format.js";

// Columns: {key, label, cell?, left?}; rows are objects; `chosen` tells whether a row is the selected one.
export function sortable(columns, rows, { by, descending = true, onrow, chosen } = {}) {
  const holder = h("div", { class: "table" });
  let order = { by: by ?? columns[0].key, descending };
  const draw = () => {
    const list = [...rows].sort((a, b) => compare(a[order.by], b[order.by]) * (order.descending ? -1 : 1));
    const sort = (key) => () => {
      order = { by: key, descending: order.by === key ? !order.descending : isNumber(rows[0]?.[key]) };
      draw();
    };
    replace(holder, h("table", {},
      h("thead", {}, h("tr", {}, columns.map((column) => h("th", { "aria-sort": order.by === column.key ? (order.descending ? "descending" : "ascending") : "none", class: column.left ? "left" : "" },
        h("button", { type: "button", onclick: sort(column.key), "data-key": `sort:${column.key}` }, column.label, order.by === column.key ? (order.descending ? " ↓" : " ↑") : ""))))),
      h("tbody", {}, list.map((row) => h("tr", { class: chosen?.(row) ? "is-chosen" : "" }, columns.map((column, index) => {
        const text = column.cell ? column.cell(row) : isNumber(row[column.key]) ? number(row[column.key]) : row[column.key] ?? "–";
        return h("td", { class: column.left ? "left" : "" }, index === 0 && onrow ? h("button", { type: "button", class: "plain", onclick: () => onrow(row) }, text) : text);
      }))))));
  };
  draw();
  return holder;
}

function compare(a, b) {
  if (a === b) return 0;
  if (a === null || a === undefined) return -1; // what is missing is least
  if (b === null || b === undefined) return 1;
  return a < b ? -1 : 1;
}
