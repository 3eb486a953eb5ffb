// What is selected, kept in the address so that a page can be sent to a colleague.

export const DEFAULTS = {
  run: "", other: "", view: "map", statistic: "", stage: "train", layer: "", step: "", sort: "forward", filter: "",
  sick: "", from: "", to: "", open: "", fold: "", level: "", rule: "", where: "", time: "", by: "name",
};

export class State {
  constructor(address) {
    this.address = address;
    const read = () => ({ ...DEFAULTS, ...known(address.read()) });
    this.values = read();
    this.listeners = [];
    address.listen(() => this._take(read()));
  }

  get(name) {
    return this.values[name];
  }

  // A change of several values is one change: the page is drawn once.
  set(changes) {
    const values = { ...this.values };
    for (const [name, value] of Object.entries(changes)) values[name] = value === null || value === undefined ? "" : String(value);
    if (this._take(values)) this.address.write(Object.fromEntries(Object.entries(values).filter(([name, value]) => value !== DEFAULTS[name])));
  }

  // Steps of a zoom and folded groups go with a statistic and a run; these start anew.
  listen(listener) {
    this.listeners.push(listener);
  }

  _take(values) {
    const before = this.values;
    this.values = values;
    const changed = new Set(Object.keys(DEFAULTS).filter((name) => values[name] !== before[name]));
    if (changed.size) for (const listener of this.listeners) listener(changed);
    return changed.size > 0;
  }
}

function known(values) {
  return Object.fromEntries(Object.entries(values).filter(([name]) => name in DEFAULTS));
}

// The address of the file, or of the page by itself.
export function ownAddress() {
  return {
    read: () => Object.fromEntries(new URLSearchParams(location.hash.slice(1))),
    write: (values) => history.replaceState(null, "", `#${new URLSearchParams(values)}`),
    listen: (changed) => window.addEventListener("hashchange", changed),
  };
}

// TensorBoard's address: `#lightning_bn&p.lightning_bn.layer=...`, the form that it keeps for a plugin's own values.
export function tensorboardAddress(plugin, host) {
  const prefix = `p.${plugin}.`;
  const parts = () => host.location.hash.slice(1).split("&").filter(Boolean);
  const read = () => {
    const own = parts().filter((part) => part.startsWith(prefix)).map((part) => part.slice(prefix.length));
    return Object.fromEntries(new URLSearchParams(own.join("&")));
  };
  const write = (values) => {
    const others = parts().filter((part) => !part.startsWith(prefix));
    const own = [...new URLSearchParams(values)].map(([name, value]) => `${prefix}${name}=${encodeURIComponent(value)}`);
    if (!others.length) others.push(plugin);
    // Replaced and not assigned: TensorBoard listens to changes of its address, and would load the tab anew.
    host.history.replaceState(host.history.state, "", `#${[...others, ...own].join("&")}`);
  };
  return { read, write, listen: (changed) => host.addEventListener("hashchange", changed) };
}
