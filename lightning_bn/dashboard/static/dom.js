// Builds elements. Names of layers and runs are other people's text: they only ever become text nodes and attributes.

export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "selected") element[name] = value;
    else if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children.flat(3)) {
    if (child === null || child === undefined || child === false || child === true) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

// Puts new children in the place of the old ones; the keyboard's place, where a list was scrolled to, and what was
// opened stay.
export function replace(element, ...children) {
  const root = element.getRootNode();
  const active = root.activeElement;
  const key = active && element.contains(active) ? active.getAttribute("data-key") : null;
  const caret = key && active.selectionStart !== undefined ? active.selectionStart : null;
  const scrolled = [...element.querySelectorAll("[data-scroll]")].map((each) => [each.dataset.scroll, each.scrollTop]);
  const opened = new Set([...element.querySelectorAll("details[open] > summary[data-key]")].map((each) => each.dataset.key));
  element.replaceChildren();
  append(element, children);
  for (const each of opened.size ? element.querySelectorAll("summary[data-key]") : []) if (opened.has(each.dataset.key)) each.parentNode.open = true;
  for (const [name, top] of scrolled) {
    const again = element.querySelector(`[data-scroll="${name}"]`);
    if (again) again.scrollTop = top;
  }
  if (key) focus(element, key, caret);
}

function focus(element, key, caret) {
  const again = [...element.querySelectorAll("[data-key]")].find((each) => each.getAttribute("data-key") === key);
  if (!again) return;
  again.focus({ preventScroll: true });
  if (caret !== null && again.setSelectionRange) again.setSelectionRange(caret, caret);
}

export function button(label, onclick, properties = {}) {
  return h("button", { type: "button", onclick, ...properties }, label);
}

export function select(key, label, options, value, onchange) {
  return h(
    "label", { class: "field" }, h("span", {}, label),
    h("select", { "data-key": key, onchange: (event) => onchange(event.target.value) },
      options.map(([name, text]) => h("option", { value: name, selected: name === value }, text))),
  );
}

// A chart is a picture to who can't see it, with these words.
export function described(element, words) {
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", words);
  return element;
}

export function download(name, blob) {
  const address = URL.createObjectURL(blob);
  const link = h("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

// A link only where it leads to a page: what a journal holds may say "javascript:".
export function link(address, text) {
  if (!/^https?:\/\//.test(address || "")) return address ? h("span", { class: "muted" }, address) : null;
  return h("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, text);
}

// Code and dotted names break behind their punctuation, before they would break within a word.
export const breakable = (text) => String(text).split(/(?<=[([{,=/_:]|\.(?!\d))/).flatMap((part, place) => (place ? [h("wbr"), part] : [part]));

// Code with what copies it.
export const codeBlock = (text, tag = "code") => h("div", { class: "code" }, h(tag, {}, breakable(text)), copyButton(text));

function copyButton(text) {
  const copy = async (event) => {
    const target = event.currentTarget;
    target.textContent = (await written(text)) ? "copied" : "select it and copy";
    setTimeout(() => (target.textContent = "copy"), 1500);
  };
  return button("copy", copy, { class: "copy", "aria-label": "Copy the code" });
}

async function written(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false; // no clipboard in this frame or without https
  }
}
