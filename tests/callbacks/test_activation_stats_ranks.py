"""ActivationStatsMonitor on two real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from fitting import trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from processes import environment, free_port, spawn
from small_data import training_data
from small_models import Small
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import ActivationStatsMonitor


class Keeps(Small):
    """Keeps what its first ReLU gave, in training; the other one runs on rank 1 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.only_there = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.rest[0](self.bn1(self.first(inputs)))
        self.outputs.append(hidden.detach().clone())
        if self.global_rank == 1:
            self.only_there(hidden)
        return self.rest[1:](hidden)


def _train(rank: int, world: int, port: int, directory: Path) -> None:
    environment(rank, world, port)
    torch.manual_seed(0)
    module, monitor = Keeps(), ActivationStatsMonitor(every_n_steps=2)
    logger = TensorBoardLogger(directory / "runs", version=0)
    strategy = DDPStrategy(process_group_backend="gloo")
    runner = trainer(monitor, devices=2, strategy=strategy, logger=logger, max_epochs=1, num_sanity_val_steps=0)
    data = training_data()
    runner.fit(module, DataLoader(data, 6, shuffle=True), DataLoader(data, 6))
    torch.save({"table": monitor.table(), "outputs": module.outputs}, directory / f"{rank}.pt")


def test_both_ranks_count_and_the_first_one_writes(tmp_path: Path) -> None:
    """Rows pool the activations of both ranks, are the same on both, name what ran on one alone, and are written
    once."""
    spawn(_train, 2, free_port(), tmp_path)
    ranks: list[dict[str, Any]] = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert repr(ranks[0]["table"]) == repr(ranks[1]["table"])  # NaN is not equal to itself
    rows = [row for row in ranks[0]["table"] if row["layer"] == "rest.0"]
    assert [(row["stage"], row["step"]) for row in rows] == [("train", 0), ("train", 2), ("val", 3)]
    training, validation = [slice(step, step + 1) for step in (0, 2)], slice(4, 8)
    for row, part in zip(rows, [*training, validation], strict=True):
        values = torch.cat([output for rank in ranks for output in rank["outputs"][part]]).double()
        assert row["mean"] == pytest.approx(values.mean().item())
        assert row["std"] == pytest.approx(values.std().item())
        assert row["zero_fraction"] == pytest.approx((values == 0).double().mean().item())
    there = [row for row in ranks[0]["table"] if row["layer"] == "only_there"]
    own = ranks[1]["outputs"][0].double()
    assert there[0]["mean"] == pytest.approx(own.mean().item())
    directory = tmp_path / "runs" / "lightning_logs" / "version_0"
    assert len(list(directory.glob("events.*"))) == 1
    assert len(pd.read_csv(directory / "activation_stats.csv")) == len(ranks[0]["table"])
