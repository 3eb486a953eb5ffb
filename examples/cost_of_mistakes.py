"""What mistakes cost: accuracy on the digits with each one and with the printed mend, and what ModeCheck says.

Run `python examples/cost_of_mistakes.py`; it prints the table of docs/rules/what-mistakes-cost.md, and with
`--write docs/rules/what-mistakes-cost.md` puts it there. The programs are in `costs/`. `--only BN305 BN306` makes only
the rows of these rules.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
from costs import MISTAKES, Mistake, Outcome, Setting
from scipy.stats import t

BEGIN, END = "<!-- cost_of_mistakes.py begins -->", "<!-- cost_of_mistakes.py ends -->"
HEADER = (
    "| rule | mistake | said | accuracy | mended | gain |",
    "|---|---|---|---:|---:|---:|",
)
CONFIDENCE = 0.99


def measure(mistake: Mistake, setting: Setting, *, mend: bool) -> Outcome:
    """Run a program."""
    torch.manual_seed(setting.seed)
    return mistake.run(setting, mend)


def row(mistake: Mistake, seeds: int, epochs: int) -> str:
    """Return a row of the table: means and standard deviations over the seeds, and the mean of the differences with its
    confidence interval, in bold if that leaves 0 out."""
    settings = [Setting(seed, epochs) for seed in range(seeds)]
    wrong, mended = ([measure(mistake, each, mend=mend) for each in settings] for mend in (False, True))
    differences = [after.accuracy - before.accuracy for before, after in zip(wrong, mended, strict=True)]
    gain, margin = fmean(differences), _half_width(differences)
    sure = "**" if abs(gain) > margin else ""
    rest = said(mistake.code, mended)
    cells = (
        f"[{mistake.code}]({mistake.code.lower()}.md)",
        mistake.what,
        said(mistake.code, wrong) + (f"; mended: {rest}" if rest else ""),
        _spread([each.accuracy for each in wrong]),
        _spread([each.accuracy for each in mended]),
        f"{sure}{gain:+.1f}{sure} ± {margin:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def said(own: str, outcomes: Sequence[Outcome]) -> str:
    """Return the codes of what was said above information and, be it information, of the rule `own`; and in how many of
    the runs, if not in all."""
    serious = Counter(code for each in outcomes for code in {it.code for it in each.findings if it.level != "info"})
    told = sum(any(it.code == own for it in each.findings) for each in outcomes)
    words = [f"{code}{_share(count, outcomes)}" for code, count in sorted(serious.items())]
    if own not in serious and told:
        words.append(f"{own} (information){_share(told, outcomes)}")
    return ", ".join(words)


def _share(count: int, outcomes: Sequence[Outcome]) -> str:
    return "" if count == len(outcomes) else f" ({count} of {len(outcomes)} runs)"


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f} ± {stdev(values):.1f} %"


def _half_width(values: Sequence[float]) -> float:
    """Return half the width of the confidence interval of the mean, by Student's distribution."""
    return float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def write(page: Path, rows: Sequence[str]) -> None:
    """Put the rows into the table of a page, in the place of those of the same rules."""
    before, _, rest = page.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    new = {_code(row) for row in rows}
    kept = [row for row in table.strip().splitlines()[len(HEADER) :] if _code(row) not in new]
    lines = [BEGIN, *HEADER, *sorted((*kept, *rows), key=_code), END]
    page.write_text(before + "\n".join(lines) + after)


def _code(row: str) -> str:
    return row[3:8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=10, help="runs, each with a split and initial weights of its own")
    parser.add_argument("--only", nargs="*", metavar="CODE", help="rules whose rows are wanted")
    parser.add_argument("--write", type=Path, help="a page with the two marks between which the rows go")
    options = parser.parse_args()
    rows: list[str] = []
    print(*HEADER, sep="\n")
    for mistake in sorted(MISTAKES, key=lambda each: each.code):
        if options.only is None or mistake.code in options.only:
            rows.append(row(mistake, options.seeds, options.epochs))
            print(rows[-1], flush=True)
    if options.write is not None:
        write(options.write, rows)


if __name__ == "__main__":
    main()
