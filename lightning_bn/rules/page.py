"""The page of the rules, docs/rules.md, which is installed with the package: messages send their reader to a section of
it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_COLUMNS = 5
"""Of the table of what mistakes cost, next to the rule's own."""

_HERE = Path(__file__).parent
# In a checkout the page is in docs/; a wheel has a copy of it next to this file.
_PLACES = (_HERE / "rules.md", _HERE.parent.parent / "docs" / "rules.md")


def section(code: str) -> str:
    """Return what the page says of a rule, in Markdown: the wrong program, the mend, and what the mistake costs.

    Example:
        >>> section("BN101").splitlines()[0]
        '### BN101 Eval mode in training'
    """
    page = next((place for place in _PLACES if place.is_file()), None)
    if page is None:
        return ""
    # A section begins with its anchor, which belongs to no text.
    text = re.sub(r'^<a id="\w+"></a>$', "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = re.search(rf"^### {re.escape(code)}\b.*?(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    return "\n\n".join((found.group().strip(), *_costs(text, code))) if found is not None else ""


def _costs(text: str, code: str) -> Iterator[str]:
    """Find the rule's rows in the table of what mistakes cost, each as a paragraph."""
    for row in re.findall(rf"^\| \[{re.escape(code)}\]\(#\w+\) \|(.*)\|$", text, re.MULTILINE):
        cells = [cell.strip() for cell in row.split("|")]
        if len(cells) == _COLUMNS:
            what, _, wrong, mended, gain = cells
            yield f"Accuracy with {what}: {wrong}; mended: {mended}; gain: {gain.replace('**', '')}."
