"""Honest programs: nothing above information is said of any, and with the callbacks they compute what they compute
without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import PROGRAMS
from programs.running import BEGIN, END, PAGE, row, run

# Their batch norms do not learn, or they recalibrate by themselves.
NOTHING_NEW = {"NormsInEval", "FrozenNorms", "AveragedAndRecalibrated"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_honest_program(name: str, tmp_path: Path) -> None:
    """With all callbacks: no finding above information, the layers recalibrated; and once that is undone, the same
    weights, running statistics and random numbers, bit for bit."""
    plain = run(name, tmp_path, watched=False)
    watched = run(name, tmp_path, watched=True)
    assert [str(finding) for finding in watched.found if finding.level != "info"] == []
    assert plain.state.keys() == watched.state.keys()
    assert [key for key in plain.state if not torch.equal(plain.state[key], watched.state[key])] == []
    assert torch.equal(plain.draw, watched.draw)
    assert watched.recalibrated == (name not in NOTHING_NEW)
    assert row(name, watched.found) in PAGE.read_text()


def test_there_are_sixty_and_the_page_has_each() -> None:
    """At least sixty, each with a row of its own on the page, which has no other."""
    assert len(PROGRAMS) >= 60
    rows = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in PROGRAMS]
