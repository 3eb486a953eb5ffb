"""The pages of the rules, docs/rules/, which are installed with the package: messages send their reader to one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_COLUMNS = 5
"""Of the table of what mistakes cost, next to the rule's own."""

_HERE = Path(__file__).parent
# In a checkout the pages are in docs/; a wheel has a copy of them next to this file.
_FOLDERS = (_HERE / "pages", _HERE.parent.parent / "docs" / "rules")


def rule_page(code: str, *, full: bool = False) -> str:
    """Return the page of a rule, in Markdown: the wrong program, the mended one, and what the mistake costs.

    Args:
        code: of the rule, as BN101.
        full: with what comes below the programs, "In detail".

    Example:
        >>> rule_page("BN101").splitlines()[0]
        '# BN101 Eval mode in training'
    """
    page = _read(f"{code.lower()}.md")
    short, heading, details = page.partition("\n## ")
    return "\n\n".join((short.strip(), *_costs(code), *([(heading + details).strip()] if full and details else [])))


def _read(name: str) -> str:
    page = next((folder / name for folder in _FOLDERS if (folder / name).is_file()), None)
    return "" if page is None else page.read_text(encoding="utf-8")


def _costs(code: str) -> Iterator[str]:
    """Find the rule's rows in the table of what mistakes cost, each as a paragraph."""
    for row in re.findall(rf"^\| \[{re.escape(code)}\]\([^|]*\|(.*)\|$", _read("what-mistakes-cost.md"), re.MULTILINE):
        cells = [cell.strip() for cell in row.split("|")]
        if len(cells) == _COLUMNS:
            what, _, wrong, mended, gain = cells
            yield f"Accuracy with {what}: {wrong}; mended: {mended}; gain: {gain.replace('**', '')}."
