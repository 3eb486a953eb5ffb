// The page of a rule: headings, paragraphs, code in fences and between backticks. All of it becomes text nodes.
import { codeBlock, h } from "./dom.js";

export function markdown(text) {
  const parts = text.split(/^```\w*\n([\s\S]*?)^```$/m);
  return h("div", { class: "markdown" }, parts.map((part, index) => (index % 2 ? codeBlock(part.trimEnd(), "pre") : paragraphs(part))));
}

function paragraphs(text) {
  return text.split(/\n{2,}/).map((each) => each.trim()).filter(Boolean).map((each) => (each.startsWith("#") ? h("strong", {}, each.replace(/^#+ /, "")) : h("p", {}, inline(each.replaceAll("\n", " ")))));
}

// Links of Markdown lead to other pages of the documentation, which are not here: their words are.
function inline(text) {
  return text.replaceAll(/\[([^\]]+)\]\([^)]*\)/g, "$1").replaceAll("**", "").split("`").map((part, index) => (index % 2 ? h("code", {}, part) : part));
}
