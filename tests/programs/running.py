"""Run a program with all callbacks or without, and write the row of the table of what was said of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from fitting import quiet, trainer
from small_data import data

from lightning_bn import (
    ActivationStatsMonitor,
    BatchNormRecalibration,
    CompareAverages,
    Exponential,
    Finding,
    ModeCheck,
    Window,
)
from programs import PROGRAMS

PAGE = Path(__file__).parent.parent.parent / "docs" / "rules" / "honest-programs.md"
BEGIN, END = "<!-- programs begin -->", "<!-- programs end -->"


class Outcome(NamedTuple):
    """What a fit leaves behind."""

    state: dict[str, torch.Tensor]
    draw: torch.Tensor
    found: list[Finding]
    recalibrated: bool


def run(name: str, folder: Path, *, watched: bool) -> Outcome:
    """Run a program for two epochs; `watched`: with all callbacks, of which the recalibration is undone after the
    fit."""
    torch.manual_seed(0)
    program = PROGRAMS[name]
    module = program.make()
    check = ModeCheck(action="log", every_n_steps=1)
    repair = BatchNormRecalibration(forward=program.forward)
    watchers: list[pl.Callback] = []
    if watched:
        monitor = ActivationStatsMonitor(every_n_steps=1, heatmaps=False)
        averages = {"window": Window(3), "fast": Exponential(0.5)}
        compare = CompareAverages(averages, monitor="of_weights", recalibrated=program.forward is None)
        watchers = [check, monitor, compare, repair]
    options = {"max_epochs": 2, "default_root_dir": folder, **program.options}
    with quiet():
        trainer(*[make() for make in program.callbacks], *watchers, **options).fit(
            logs(module), data(batches=4), data(batches=1)
        )
    after = copy.deepcopy(module.state_dict())
    if repair.report is not None:
        repair.report.rollback()
    state = copy.deepcopy(module.state_dict())
    changed = any(not torch.equal(after[key], state[key]) for key in state)
    return Outcome(state, torch.rand(()), check.findings, changed)


def logs(module: pl.LightningModule) -> pl.LightningModule:
    """Let the validation log something, which `CompareAverages` needs."""
    step = module.validation_step

    def validation_step(*args: Any) -> Any:
        result = step(*args)
        module.log("of_weights", next(module.parameters()).detach().mean())
        return result

    module.validation_step = validation_step  # type: ignore[method-assign]
    return module


def row(name: str, found: list[Finding]) -> str:
    """Return the row of the table on the page."""
    kind = PROGRAMS[name].make.__module__.rpartition(".")[2].replace("_", "-")
    said = ", ".join(f"[{code}]({code.lower()}.md)" for code in sorted({finding.code for finding in found}))
    return f"| {name} | {kind} | {said} |"
