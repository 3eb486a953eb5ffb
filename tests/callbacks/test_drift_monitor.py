"""`DriftMonitor` in real runs of the Trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitting import trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from small_models import Steps
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import BatchNormRecalibration, DriftMonitor, drift, recalibrate
from lightning_bn.recalibration.spread import spread_of


class Net(Steps, pl.LightningModule):
    """Its steps call a part and not the module, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])


def loader(number: int, seed: int, shift: float = 0.0, size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(number, 1, 6, 6, generator=generator) + shift
    return DataLoader(TensorDataset(images, torch.arange(number) % 8), size)


def recalibrated() -> Net:
    torch.manual_seed(0)
    module = Net()
    recalibrate(module, loader(1000, 1), spread=True, progress=False)
    return module


def heard(*arguments: Any, call: Any, **options: Any) -> list[str]:
    """What a call says by this package's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*arguments, **options)
    return [str(each.message) for each in caught if "lightning_bn" in each.filename]


def test_each_batch_of_each_stage_is_judged(tmp_path: Path) -> None:
    """With the figures that `drift` has for the same batches; the first alarm of a stage is said; the loggers get the
    rate."""
    module, monitor = recalibrated(), DriftMonitor()
    runner = trainer(monitor, logger=CSVLogger(tmp_path))
    shifted = loader(40, 3, shift=0.5)
    heard(module, loader(80, 2), verbose=False, call=runner.test)
    clean = monitor.watches["test"]
    alarms = sum(drift(module, batch).is_alarm for batch in loader(80, 2))
    assert (clean.batches, clean.images, clean.alarms) == (10, 80, alarms)
    (said,) = heard(module, shifted, call=runner.predict)
    assert said.startswith("DriftMonitor, predict: Drift: 8 images")
    watch = monitor.watches["predict"]
    assert (watch.batches, watch.alarms) == (5, 5)
    reports = [drift(module, batch) for batch in shifted]
    assert watch.first.as_dict() == reports[0].as_dict()
    assert watch.last.as_dict() == reports[-1].as_dict()
    (said,) = heard(module, shifted, verbose=False, call=runner.validate)
    assert said.startswith("DriftMonitor, validate: ")
    runner.logger.save()
    logged = (next(tmp_path.rglob("metrics.csv"))).read_text().splitlines()
    assert {"batch_norm/drift/test/alarm_rate", "batch_norm/drift/validate/z"} <= set(logged[0].split(","))
    assert not any(each._forward_pre_hooks for each in module.modules())


def test_a_fit_measures_and_then_judges(tmp_path: Path) -> None:
    """With `BatchNormRecalibration(spread=True)` before each validation; the checkpoint of the fit has the spread, and
    a run that loads it judges by it; so does one that resumes."""
    monitor = DriftMonitor(alarm=0.05)
    measured = BatchNormRecalibration(when="validation", spread=True, dataloader=loader(400, 1))
    saver = ModelCheckpoint(tmp_path, save_last=True)
    runner = trainer(measured, monitor, saver, max_epochs=2, default_root_dir=tmp_path)
    torch.manual_seed(0)
    module = Net()
    heard(module, loader(400, 0, size=16), loader(800, 2), call=runner.fit)
    watch = monitor.watches["validate"]
    assert watch.batches == 200
    assert watch.alarms <= 20  # 10 are expected; with twice as many it would be another distribution
    assert "Spread of 400 images kept." in str(measured.report)
    other, again = Net(), DriftMonitor()
    path = tmp_path / "last.ckpt"
    heard(other, loader(80, 2), ckpt_path=path, weights_only=False, verbose=False, call=trainer(again).test)
    assert again.watches["test"].batches == 10
    assert torch.equal(spread_of(other.net[1]).draws, spread_of(module.net[1]).draws)
    resumed = trainer(measured, DriftMonitor(), saver, max_epochs=3, default_root_dir=tmp_path)
    heard(Net(), loader(400, 0, size=16), loader(80, 2), ckpt_path=path, weights_only=False, call=resumed.fit)
    assert resumed.current_epoch == 3


def test_the_spread_is_measured_with_the_callbacks_arguments(tmp_path: Path) -> None:
    """Its `forward` runs the batches a second time, and no more of them than `num_batches`."""
    seen: list[int] = []

    def forward(module: Net, batch: Any) -> None:
        seen.append(len(batch[0]))
        module.net(batch[0])

    measured = BatchNormRecalibration(spread=True, num_batches=3, forward=forward, dataloader=loader(400, 1))
    trainer(measured, max_epochs=1, default_root_dir=tmp_path).fit(Net(), loader(64, 0), loader(64, 2))
    assert seen[-6:] == [8] * 6
    assert measured.report.batches == 3
    assert measured.report.spread_images == 24


def test_a_recalibrated_copy_of_a_file_has_its_own_spread(tmp_path: Path) -> None:
    """And the fit's own module keeps the one that it has."""
    saver = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, save_last=True)
    measured = BatchNormRecalibration(spread=True, checkpoints=("last",), dataloader=loader(400, 1))
    module = Net()
    trainer(measured, saver, max_epochs=1, default_root_dir=tmp_path).fit(module, loader(64, 0), loader(64, 2))
    state = torch.load(tmp_path / "last-recalibrated.ckpt", weights_only=False)["state_dict"]
    assert torch.equal(state["net.1.spread.draws"], spread_of(module.net[1]).draws)


def test_statistics_that_lag_are_not_judged() -> None:
    """Without a spread, and while training goes on after it was measured: said once a fit, which goes on."""
    said = heard(Net(), loader(64, 0), loader(64, 2), call=trainer(DriftMonitor(), max_epochs=2).fit)
    assert len(said) == 1
    assert "validate is not judged" in said[0]
    assert "none of the 2 batch-norm layers has a spread" in said[0]
    said = heard(recalibrated(), loader(64, 0), loader(64, 2), call=trainer(DriftMonitor(), max_epochs=3).fit)
    assert len(said) == 1
    assert "have moved since the spread was measured" in said[0]


def test_a_fit_computes_the_same_with_it() -> None:
    """Weights and statistics are bit-identical with and without the callback."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        states = []
        for callbacks in ([], [DriftMonitor(alarm=0.5)]):
            torch.manual_seed(0)
            module = Net()
            measured = BatchNormRecalibration(when="validation", spread=True)
            trainer(measured, *callbacks, max_epochs=2).fit(module, loader(64, 0), loader(64, 2))
            states.append(module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert list(states[0]) == list(states[1])


def test_a_sanity_check_is_not_judged() -> None:
    """Its batches are validation's first, and would count twice."""
    monitor, module = DriftMonitor(), recalibrated()
    heard(module, loader(16, 0), loader(40, 2), call=trainer(monitor, max_epochs=0, num_sanity_val_steps=2).fit)
    judged = {stage: watch.batches for stage, watch in monitor.watches.items()}
    assert judged == {}


def test_no_probability_is_refused() -> None:
    with pytest.raises(ValueError, match=r"DriftMonitor\(alarm=5\): the probability of a false alarm, as in 0.01"):
        DriftMonitor(alarm=5)
