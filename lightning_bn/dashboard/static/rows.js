// The rows of the map: layers, and groups of them by the prefix of their names, each with the values of its worst child.
import { badness, isSick } from "./format.js";
import { flags, limitsOfRow, weight } from "./thin.js";

const FEW = 40; // as many rows are shown one by one; of more, only the groups of the first sick layer are open

export function makeRows(grid, statistic, options) {
  const leaves = grid.layers.map((name, index) => leaf(name, index, grid, statistic));
  const wanted = leaves.filter((each) => matches(each.name, options.filter) && (!options.sick || each.firstSick !== null));
  if (options.sort !== "forward") return sorted(wanted, options.sort);
  const groups = grouped(wanted, 0, "");
  const rows = [];
  const [first] = sorted(wanted, "first");
  walk(groups, 0, "", rows, { ...options, many: wanted.length > FEW, first: first?.firstSick === null ? null : first }, grid, statistic);
  return rows;
}

// A pattern is a part of the name, or has stars: `layer4.*.bn?`.
export function matches(name, pattern) {
  if (!pattern) return true;
  if (!/[*?]/.test(pattern)) return name.toLowerCase().includes(pattern.toLowerCase());
  const expression = pattern.replace(/[.+^${}()|[\]\\]/g, "\\$&").replaceAll("*", ".*").replaceAll("?", ".");
  return new RegExp(`^${expression}$`, "i").test(name);
}

function leaf(name, index, grid, common) {
  const statistic = limitsOfRow(grid, index, common);
  const values = grid.values[index];
  const warm = flags(grid.warming[index], values.length);
  let worst = -1;
  let firstSick = null;
  for (let column = 0; column < values.length; column++) {
    if (warm[column]) continue;
    worst = Math.max(worst, badness(values[column], statistic));
    if (firstSick === null && isSick(values[column], statistic)) firstSick = grid.first[column];
  }
  return { kind: "layer", statistic, name, label: name, layer: name, depth: 0, values, warm, worst, firstSick, forward: index };
}

function sorted(leaves, sort) {
  const order = [...leaves];
  if (sort === "worst") order.sort((a, b) => b.worst - a.worst || a.forward - b.forward);
  if (sort === "first") order.sort((a, b) => (a.firstSick ?? Infinity) - (b.firstSick ?? Infinity) || a.forward - b.forward);
  return order;
}

// Layers that follow each other and share a prefix are a group; a group of one is its layer.
function grouped(leaves, depth, prefix) {
  const found = [];
  for (const each of leaves) {
    const parts = each.name.split(".");
    const head = parts.length > depth + 1 ? parts.slice(0, depth + 1).join(".") : null;
    const last = found[found.length - 1];
    if (head !== null && last && last.head === head) last.leaves.push(each);
    else found.push({ head, leaves: [each], prefix });
  }
  return found.map((each) => {
    if (each.head === null || each.leaves.length === 1) return each.leaves.length === 1 ? each.leaves[0] : each;
    const children = grouped(each.leaves, depth + 1, each.head);
    // A prefix that all share adds no fold of its own.
    return children.length === 1 && children[0].head ? children[0] : { ...each, children };
  });
}

function walk(nodes, depth, prefix, rows, options, grid, statistic) {
  const only = nodes.filter((node) => node.children).length === 1; // beside the input, say: folded, it would be the map
  const label = (name) => (prefix ? name.slice(prefix.length + 1) : name);
  for (const node of nodes) {
    if (!node.children) {
      rows.push({ ...node, depth, label: label(node.name) });
      continue;
    }
    const isOpen = options.open.has(node.head) || (!options.fold.has(node.head) && (!options.many || only || node.leaves.includes(options.first)));
    rows.push({ ...group(node, grid, statistic), depth, isOpen, label: label(node.head) });
    if (isOpen) walk(node.children, depth + 1, node.head, rows, options, grid, statistic);
  }
}

function group(node, grid, statistic) {
  const length = grid.first.length;
  const values = new Array(length).fill(null);
  const warm = new Uint8Array(length);
  const from = new Array(length).fill(null);
  const judged = new Uint8Array(length);
  for (let column = 0; column < length; column++) {
    let worst = -2;
    for (const each of node.leaves) {
      const bad = weight(each.values[column], each.warm[column], each.statistic);
      if (bad <= worst) continue;
      worst = bad;
      values[column] = each.values[column];
      warm[column] = each.warm[column];
      from[column] = each.name;
      judged[column] = each.statistic === statistic ? 1 : 0;
    }
  }
  const sick = node.leaves.filter((each) => each.firstSick !== null).length;
  const first = node.leaves.map((each) => each.firstSick).filter((each) => each !== null);
  return {
    kind: "group", name: node.head, values, warm, from, judged, sick,
    size: node.leaves.length, layers: node.leaves.map((each) => each.name), firstSick: first.length ? Math.min(...first) : null,
  };
}
