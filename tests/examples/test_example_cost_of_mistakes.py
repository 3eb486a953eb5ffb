"""examples/cost_of_mistakes.py, and the table it wrote into docs/rules.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cost_of_mistakes import BEGIN, END, MISTAKES, measure
from runs import quiet

PAGE = Path(__file__).parent.parent.parent / "docs" / "rules.md"


def rows() -> list[list[str]]:
    """Return the cells of the table on the page."""
    table = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def test_table_is_that_of_the_example() -> None:
    """Every mistake has a row, in which its rule spoke and no other, before the mend alone, and the mend gained
    accuracy."""
    assert [row[0] for row in rows()] == [mistake.what for mistake in MISTAKES]
    for row, mistake in zip(rows(), MISTAKES, strict=True):
        assert row[1] == f"[{mistake.code}](#{mistake.code.lower()})"
        wrong, mended = (float(re.match(r"[\d.]+", cell).group()) for cell in row[2:])
        assert wrong < mended


@pytest.mark.parametrize("code", ["BN101", "BN107", "BN209"])
def test_one_epoch(code: str) -> None:
    """The rule speaks of the mistake and not of the mended program."""
    mistake = next(each for each in MISTAKES if each.code == code)
    with quiet():
        assert measure(mistake.wrong, 1, shuffled=True)[1] == [code]
        assert measure(mistake.mended, 1, shuffled=True)[1] == []
