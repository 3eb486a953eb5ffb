"""Every block of Python in the README and the docs runs; every line of their text is one sentence."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# docs/rules.md has wrong programs on purpose: its own test runs them.
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "rules.md")]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
TEXTS = [path for folder in (ROOT, ROOT / "docs", ROOT / ".github") for path in sorted(folder.glob("*.md"))]
# The end of a sentence and the beginning of the next one: a name that is never capitalised, or whatever is not a lower
# case letter. An initial ("K. He") and "et al." end none.
NEXT = re.compile(
    r"""(?<![A-Z])(?<!\bal)(?<!e\.g)(?<!i\.e)[.!?]["')\]*`_]*\s+(?=[A-Z`*\["(0-9'_]|(?:lightning-bn|torch)\b)"""
)
ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s")
NO_TEXT = re.compile(r"^ {4}|^\s*(?:[|#<>]|!!!|:::|!?\[[^\]]*\](?:: |\([^)]*\)$)|\d+\. \W*$)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's blocks run one after the other, in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(BLOCK.findall(page.read_text()), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


def text_lines(page: Path) -> list[str]:
    """Return the page's lines; whatever is no running text (code, tables, headings, options) is an empty one."""
    text = re.sub(r"(?ms)^(\s*```).*?^\s*```$", "", page.read_text())
    return ["" if NO_TEXT.match(line) else line for line in text.splitlines()]


def two_sentences(line: str) -> bool:
    """Return whether a sentence begins in the line after another has ended; what stands in backticks is a word."""
    text = re.sub(r"`[^`]*`", "`x`", ITEM.sub("", line))
    return NEXT.search(text) is not None


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_one_sentence_a_line(page: Path) -> None:
    """A change to a sentence is a change to a line: no line has two sentences, and no sentence two lines."""
    lines = text_lines(page)
    assert [line for line in lines if two_sentences(line)] == []
    cut = [
        line
        for line, after in pairwise(lines)
        if line.strip() and after.strip() and not ITEM.match(after) and not re.search(r"""[.!?:]["')\]*`_]*$""", line)
    ]
    assert cut == []
