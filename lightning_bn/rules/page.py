"""The page of the rules, docs/rules.md, which is installed with the package: messages send their reader to a section of
it."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["section"]

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
    return found.group().strip() if found is not None else ""
