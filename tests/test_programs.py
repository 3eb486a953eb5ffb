"""Honest programs: nothing above information is said of any, and with the callbacks they compute what they compute
without."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from programs import PROGRAMS
from tiny_runs import data, quiet, trainer

from lightning_bn import ActivationStatsMonitor, Finding, ModeCheck

PAGE = Path(__file__).parent.parent / "docs" / "rules.md"
BEGIN, END = "<!-- programs begin -->", "<!-- programs end -->"

Outcome = tuple[dict[str, torch.Tensor], torch.Tensor, list[Finding]]


def run(name: str, folder: Path, *, watched: bool) -> Outcome:
    """Run a program for two epochs, and return its state, the next random number and what was found."""
    torch.manual_seed(0)
    program = PROGRAMS[name]
    module = program.make()
    check = ModeCheck(action="log", every_n_steps=1)
    watchers = [check, ActivationStatsMonitor(every_n_steps=1, heatmaps=False)] if watched else []
    options = {"max_epochs": 2, "default_root_dir": folder, **program.options}
    with quiet():
        trainer(*[make() for make in program.callbacks], *watchers, **options).fit(
            module, data(batches=4), data(batches=1)
        )
    return copy.deepcopy(module.state_dict()), torch.rand(()), check.findings


def row(name: str, found: list[Finding]) -> str:
    """Return the row of the table on the page."""
    kind = PROGRAMS[name].make.__module__.rpartition(".")[2].replace("_", "-")
    said = ", ".join(f"[{code}](#{code.lower()})" for code in sorted({finding.code for finding in found}))
    return f"| {name} | {kind} | {said} |"


@pytest.mark.parametrize("name", PROGRAMS)
def test_honest_program(name: str, tmp_path: Path) -> None:
    """The same weights, running statistics and random numbers to the bit, and no finding above information."""
    plain, draw, _ = run(name, tmp_path, watched=False)
    watched, same_draw, found = run(name, tmp_path, watched=True)
    assert [str(finding) for finding in found if finding.level != "info"] == []
    assert plain.keys() == watched.keys()
    assert [key for key in plain if not torch.equal(plain[key], watched[key])] == []
    assert torch.equal(draw, same_draw)
    assert row(name, found) in PAGE.read_text()


def test_there_are_sixty() -> None:
    """At least sixty, each with layers of batch norm that training runs."""
    assert len(PROGRAMS) >= 60
