"""docs/rules: of each wrong program the rule speaks, of each mended one it does not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fitting import quiet

from lightning_bn.rules import RULES
from lightning_bn.rules.exported import EXPORT_RULES
from lightning_bn.rules.register import LINK

FOLDER = Path(__file__).parent.parent.parent / "docs" / "rules"
TEXT = (FOLDER / "index.md").read_text()
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
PRELUDE, *_ = BLOCK.findall(TEXT)
PAGES = {path.stem.upper(): path.read_text() for path in sorted(FOLDER.glob("bn*.md"))}
SECTIONS = {code: BLOCK.findall(page) for code, page in PAGES.items()}


def codes(namespace: dict[str, Any], block: str) -> set[str]:
    """Return the codes that are found when the block runs; each message says how to read on."""
    with quiet():
        exec(compile(block, "docs/rules", "exec"), namespace)
    found = namespace["found"]
    assert all(str(finding).endswith(f"more: {LINK.format(code=finding.code)}") for finding in found)
    return {finding.code for finding in found}


@pytest.mark.parametrize("code", [code for code in {**RULES, **EXPORT_RULES} if code != "BN306"])
def test_programs(code: str) -> None:
    """The first program breaks the rule, the second, which may use what the first defined, does not."""
    wrong, mended = SECTIONS[code]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(PRELUDE, namespace)
    assert code in codes(namespace, wrong)
    assert code not in codes(namespace, mended)


@pytest.mark.parametrize("code", [*RULES, *EXPORT_RULES])
def test_table(code: str) -> None:
    """The table of all rules says what the rule says, and links to its page, which is headed by a title."""
    (row,) = (line for line in TEXT.splitlines() if line.startswith(f"| [{code}]({code.lower()}.md)"))
    assert re.match(rf"# {code} [A-Z1][\w', -]+\n", PAGES[code])
    level, title = (cell.strip() for cell in row.split("|")[2:4])
    rule = {**RULES, **EXPORT_RULES}[code]
    assert rule.level in level.split(", ")
    assert title.replace("`", "") == rule.title


@pytest.mark.parametrize("code", PAGES)
def test_short(code: str) -> None:
    """What stands above the programs, and is printed with them, is read at a glance; the rest is below."""
    above = PAGES[code].partition("\n```")[0]
    assert len(above.split()) <= 80
    assert "\n## " not in above
    assert PAGES[code].count("\n## ") <= 1
