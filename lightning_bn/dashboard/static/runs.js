// Which of several runs needs to be looked at.
import { plural } from "./format.js";

const LEVELS = ["error", "warning", "past"];

// The run with the worst verdict; of several the newest.
export function neediest(summaries) {
  const rank = ({ level }) => (LEVELS.includes(level) ? LEVELS.indexOf(level) : LEVELS.length);
  return [...summaries].sort((a, b) => rank(a) - rank(b) || (b.changed ?? 0) - (a.changed ?? 0))[0]?.name;
}

// The run's name, and what is wrong with it, as an entry of the list of runs.
export function entry(name, summary) {
  const { sick, guard, recovered } = summary ?? {};
  const words = sick ? `${plural(sick, "layer")} sick` : guard ? plural(guard, "mistake") : recovered ? "recovered" : "";
  return [name, words ? `${name}: ${words}` : name];
}
