"""A run that is killed and goes on from its checkpoint is one run: in the table, and in the verdict."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from fitting import fit
from lightning.pytorch.callbacks import ModelCheckpoint
from small_models import Small
from torch import nn

from lightning_bn import ActivationStatsMonitor

# With 8 batches an epoch: sick from step 2, well again at step 5, saved at step 6, killed at step 10.
SICK, WELL, SAVED, KILLED = 2, 5, 6, 10


class Blow(pl.Callback):
    """Make the first layer's scale explode for a while, and end the first process in the middle of a step."""

    def __init__(self, kill: bool) -> None:
        self.kill = kill

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Small, batch: object, batch_idx: int) -> None:
        if trainer.global_step in (SICK, WELL):
            with torch.no_grad():
                pl_module.bn1.weight.fill_(1e6 if trainer.global_step == SICK else 1.0)
        if self.kill and trainer.global_step == KILLED:
            raise KeyboardInterrupt

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Small, optimizer: object) -> None:
        for parameter in pl_module.parameters():
            parameter.grad = None  # nothing else moves


def run(folder: Path, *, kill: bool, ckpt_path: Path | None = None) -> ActivationStatsMonitor:
    monitor = ActivationStatsMonitor(every_n_steps=1, verbose=False)
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=SAVED, save_top_k=-1)
    callbacks = (Blow(kill), monitor, save)
    if kill:
        with pytest.raises(SystemExit):
            fit(*callbacks, default_root_dir=folder, ckpt_path=ckpt_path)
    else:
        fit(*callbacks, default_root_dir=folder, ckpt_path=ckpt_path)
    return monitor


@pytest.mark.filterwarnings(
    "ignore:.*KeyboardInterrupt", "ignore:Checkpoint directory", "ignore:You.re resuming from a checkpoint that ended"
)
def test_a_resumed_run_has_each_step_once_and_remembers_what_was_sick(tmp_path: Path) -> None:
    """The table has one row for each layer and step, as in a run that was never killed, and the verdict of the process
    that went on names what was sick before."""
    whole = run(tmp_path / "whole", kill=False)
    run(tmp_path / "killed", kill=True)
    resumed = run(tmp_path / "killed", kill=False, ckpt_path=tmp_path / "killed" / f"step={SAVED}.ckpt")
    tables = []
    for folder in ("whole", "killed"):
        with (tmp_path / folder / "activation_stats.csv").open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    places = [Counter((row["layer"], row["stage"], row["step"]) for row in table) for table in tables]
    assert places[0] == places[1]
    assert set(places[1].values()) == {1}
    assert (SICK, WELL - 1) in {(each.first, each.last) for each in resumed.episodes("train")}
    assert [str(each) for each in resumed.episodes("train")] == [str(each) for each in whole.episodes("train")]
    assert resumed.verdict() == whole.verdict()


def test_two_monitors_keep_a_state_each(tmp_path: Path) -> None:
    """Lightning refuses two callbacks whose states can't be told apart."""
    keys = {ActivationStatsMonitor(layers).state_key for layers in (None, "rest.*", nn.ReLU, [nn.ReLU, "bn1"])}
    assert len(keys) == 4
    fit(
        ActivationStatsMonitor("bn1", verbose=False),
        ActivationStatsMonitor("rest.*", verbose=False),
        default_root_dir=tmp_path,
    )
