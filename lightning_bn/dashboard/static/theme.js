// Light or dark, and the colours in which plotly draws; page.css has the same as variables.
import { described } from "./dom.js";

const LIGHT = {
  text: "#1f2328", muted: "#656d76", line: "#d0d7de", paper: "#ffffff", plot: "#ffffff", accent: "#0969da", sick: "#b42318",
  nan: "#000000", missing: "#e3e6ea", faint: "rgba(101,109,118,0.22)",
  series: ["#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#57606a", "#0e7490", "#7d4e00"],
  rising: [[0, "#f7f4ef"], [0.3, "#fdd49e"], [0.55, "#fc8d59"], [0.8, "#d7301f"], [1, "#7f0000"]],
  both: [[0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f5"], [0.75, "#f4a582"], [1, "#b2182b"]],
};
const DARK = {
  text: "#e6edf3", muted: "#9198a1", line: "#3d444d", paper: "#1c2128", plot: "#1c2128", accent: "#58a6ff", sick: "#ff7b72",
  nan: "#000000", missing: "#3a4048", faint: "rgba(145,152,161,0.22)",
  series: ["#58a6ff", "#f0883e", "#3fb950", "#bc8cff", "#f778ba", "#9198a1", "#39c5cf", "#d29922"],
  rising: [[0, "#262c36"], [0.3, "#5c3d2e"], [0.55, "#a8522d"], [0.8, "#ee7b4a"], [1, "#ffe0b5"]],
  both: [[0, "#9ccbff"], [0.25, "#2f6db3"], [0.5, "#262c36"], [0.75, "#b0543b"], [1, "#ffc2a1"]],
};

// TensorBoard marks its body; the page by itself follows the system.
export function watchTheme(host, changed) {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (host ? host.document.body.classList.contains("dark-mode") : system.matches);
  const apply = () => {
    const theme = isDark() ? "dark" : "light";
    if (document.documentElement.dataset.theme === theme) return;
    document.documentElement.dataset.theme = theme;
    changed();
  };
  if (host) new MutationObserver(apply).observe(host.document.body, { attributes: true, attributeFilter: ["class"] });
  else system.addEventListener("change", apply);
  apply();
}

export const colours = () => (document.documentElement.dataset.theme === "dark" ? DARK : LIGHT);

export const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif";

export function axis(extra = {}) {
  const { line, muted } = colours();
  return { gridcolor: line, linecolor: line, zeroline: false, tickcolor: line, tickfont: { color: muted, size: 11 }, automargin: false, ...extra };
}

// An axis of steps says so.
export function stepAxis(extra = {}) {
  return axis({ fixedrange: true, title: { text: "step", standoff: 4, font: { size: 11, color: colours().muted } }, ...extra });
}

function layout(extra = {}) {
  const { text, paper, plot } = colours();
  return {
    paper_bgcolor: paper, plot_bgcolor: plot, font: { family: FONT, size: 12, color: text },
    showlegend: false, hovermode: "closest", margin: { l: 0, r: 0, t: 0, b: 0 }, ...extra,
  };
}

// Draws a chart, with words for who can't see it.
export function drawChart(plot, words, traces, extra, isStill = false) {
  return window.Plotly.react(described(plot, words), traces, layout(extra), { displayModeBar: false, responsive: false, doubleClick: false, staticPlot: isStill });
}
