"""`DriftMonitor` on two real processes."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitting import trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from processes import environment, free_port, spawn
from small_models import Steps
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import DriftMonitor, drift, recalibrate
from lightning_bn.recalibration.spread import give_spread


class Net(Steps, pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def images(number: int, seed: int) -> Tensor:
    return torch.rand(number, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def _tested(rank: int, world: int, port: int, folder: Path, measured_on: int | None) -> None:
    """Of every two images, that of rank 1, which runs more batches, is brighter; `measured_on` is the rank that has a
    spread, None for both."""
    environment(rank, world, port)
    module, monitor = Net(), DriftMonitor()
    recalibrate(module, images(1000, 1).split(100), spread=True, progress=False)
    if measured_on not in (None, rank):
        give_spread(module.net[1], None)
    data = images(80, 2)
    data[1::2] += 0.5
    batches = (3, 5)[rank]
    runner = trainer(
        monitor,
        limit_test_batches=batches,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        logger=CSVLogger(folder, version=0),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner.test(module, DataLoader(TensorDataset(data, torch.arange(80) % 8), 8), verbose=False)
    runner.logger.save()
    found: dict[str, Any] = {"said": [str(each.message) for each in caught if "Drift" in str(each.message)]}
    if "test" in monitor.watches:
        own = data[rank::2].split(8)[:batches]
        watch = monitor.watches["test"]
        found["counts"], found["z"] = (watch.batches, watch.images, watch.alarms), watch.largest_z
        found["expected"] = len(own), 8 * batches, sum(drift(module, batch).is_alarm for batch in own)
    torch.save(found, folder / f"{rank}.pt")


def logged(folder: Path) -> list[tuple[float, float]]:
    """Return the rates and the z."""
    (path,) = folder.rglob("metrics.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    names = [f"batch_norm/drift/test/{name}" for name in ("alarm_rate", "z")]
    return [(float(row[names[0]]), float(row[names[1]])) for row in rows if row.get(names[0])]


def test_each_batch_of_each_rank_counts_once(tmp_path: Path) -> None:
    """A rank has the counts of its own batches, as `drift` judges them, and warns of its own alarm; the logged rate is
    that of both, and the z the largest of either."""
    spawn(_tested, 2, free_port(), tmp_path, None)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["counts"] == first["expected"]
    assert second["counts"] == second["expected"]
    assert second["counts"][2] == 5
    assert second["said"][0].startswith("DriftMonitor, test, rank 1: Drift: 8 images")
    assert first["z"] < second["z"]
    assert logged(tmp_path) == [((first["counts"][2] + 5) / 8, pytest.approx(second["z"]))]


def test_a_rank_that_can_not_judge_keeps_no_other_waiting(tmp_path: Path) -> None:
    """It has no spread, and says so; the rate is that of the other rank's batches."""
    spawn(_tested, 2, free_port(), tmp_path, 1)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert "counts" not in first
    assert "has a spread to compare with" in first["said"][0]
    assert logged(tmp_path) == [(1.0, pytest.approx(second["z"]))]
    assert second["counts"] == (5, 40, 5)
