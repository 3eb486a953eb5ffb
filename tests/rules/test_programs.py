"""Honest programs: nothing above information is said of any, and with the callbacks they compute what they compute
without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import PROGRAMS
from programs.running import PAGE, row, run

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


def test_there_are_sixty() -> None:
    """At least sixty, each with layers of batch norm that training runs."""
    assert len(PROGRAMS) >= 60
