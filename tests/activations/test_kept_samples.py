"""Samples of drift alone at consecutive steps, which are evaluated together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import ActivationStatsMonitor, BatchNormRecalibration, Cumulative, Window, convert_batch_norm
from lightning_bn.activations.collector import LayerCollector
from lightning_bn.callbacks.monitored_run import MAX_WAITING
from lightning_bn.error_boundary import RERAISE

STEPS = 40


class Net(pl.LightningModule):
    """Two batch norms, of which a step of the callback `change` may change what it likes."""

    def __init__(self, averaging: Any = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3))
        if averaging is not None:
            self.layers = convert_batch_norm(self.layers, averaging)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.mse_loss(self.layers(batch), torch.zeros(len(batch), 3))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class AtStep(pl.Callback):
    """Call a function of step and module before each step."""

    def __init__(self, function: Callable[[int, Net], object]) -> None:
        self.function = function

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.function(batch_idx, module)


def alone(**arguments: Any) -> ActivationStatsMonitor:
    return ActivationStatsMonitor(every_n_steps=1, activations=False, verbose=False, **arguments)


def fit(folder: Path, module: Net, *callbacks: pl.Callback) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = DataLoader(torch.randn(STEPS, 5, 4, generator=generator), batch_size=None)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        max_epochs=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, batches)


def nothing(step: int, module: Net) -> None:
    pass


def poison(step: int, module: Net) -> None:
    if step in (5, 20):
        module.layers[1].running_mean[2] = torch.nan
    if step == 7:
        module.layers[1].running_mean[2] = 0.0


def other_momentum(step: int, module: Net) -> None:
    module.layers[4].momentum = 0.5 / (step // 3 + 1)


def prune(step: int, module: Net) -> None:
    if step == 10:
        narrow = module.layers[4]
        module.layers[3] = nn.Linear(6, 2)
        narrow.weight, narrow.bias = (nn.Parameter(each.detach()[:2]) for each in (narrow.weight, narrow.bias))
        narrow.running_mean, narrow.running_var = narrow.running_mean[:2], narrow.running_var[:2]
        narrow.num_features = 2
        module.layers.append(nn.Linear(2, 3))


def reset(step: int, module: Net) -> None:
    if step in (3, 25):
        module.layers[1].reset_running_stats()
    if step == 12:
        nn.init.zeros_(module.layers[4].weight)


def begin(step: int, module: Net) -> None:
    if step in (0, 9, 12):
        nn.init.constant_(module.layers[4].weight, 1.0 if step == 9 else 1e-9)
    if step == 6:
        module.layers[1].running_mean.fill_(3.0)
        module.layers[1].num_batches_tracked.zero_()
    if step == 20:
        module.layers[1].reset_running_stats()


def sleep(step: int, module: Net) -> None:
    module.layers[1].train(step % 3 != 0)


@pytest.mark.parametrize("averaging", [None, Window(3), Window(3, pooled=True), Cumulative()], ids=str)
@pytest.mark.parametrize("change", [nothing, poison, other_momentum, prune, reset, begin, sleep])
def test_together_they_are_what_each_is_by_itself(tmp_path: Path, averaging: Any, change: Any) -> None:
    """Table, verdict and files are those of a monitor that has to tell of an episode as it begins, at every step."""
    if averaging is not None and change in (prune, other_momentum):
        pytest.skip("of torch's layers")
    monitors = {"together": alone(), "each": alone(on_episode=lambda episode: None)}
    for name, monitor in monitors.items():
        torch.manual_seed(0)
        fit(tmp_path / name, Net(averaging), AtStep(change), monitor)
    together, each = monitors.values()
    assert len(each.table()) == 2 * STEPS
    assert repr(together.table()) == repr(each.table())
    assert together.verdict() == each.verdict()
    assert together.state_dict() == each.state_dict()
    csv, journal = (
        [(tmp_path / name / file).read_text().splitlines() for name in monitors]
        for file in ("activation_stats.csv", "lightning_bn.jsonl")
    )
    assert csv[0] == csv[1]
    samples = [[line for line in lines if line.startswith('{"kind":"sample"')] for lines in journal]
    assert samples[0] == samples[1]
    assert len(samples[0]) == STEPS


def test_a_kill_loses_less_than_seventeen_steps(tmp_path: Path) -> None:
    """At each step the file holds all samples but the last 16 at most, and in the end all of them."""
    late = []

    def count(step: int, module: Net) -> None:
        file = tmp_path / "activation_stats.csv"
        written = len(file.read_text().splitlines()) // 2 if file.exists() else 0
        late.append(step - written)

    fit(tmp_path, Net(), AtStep(count), alone())
    assert 0 < max(late) < MAX_WAITING
    assert len((tmp_path / "activation_stats.csv").read_text().splitlines()) == 1 + 2 * STEPS


def test_whoever_looks_finds_all_samples(tmp_path: Path) -> None:
    """Table, episodes and verdict in the middle of a run have the step before."""
    monitor = alone()

    def look(step: int, module: Net) -> None:
        assert len(monitor.table()) == 2 * step
        assert (step == 0) == (monitor.verdict() == ["Nothing was seen: no sample was taken."])

    fit(tmp_path, Net(), AtStep(look), monitor)


def test_a_fit_that_fails_loses_none(tmp_path: Path) -> None:
    """An exception in a step writes what waited."""

    def fail(step: int, module: Net) -> None:
        if step == 9:
            raise KeyError("nine")

    with pytest.raises(KeyError, match="nine"):
        fit(tmp_path, Net(), AtStep(fail), alone())
    assert len((tmp_path / "activation_stats.csv").read_text().splitlines()) == 1 + 2 * 9


def test_the_end_comes_last(tmp_path: Path) -> None:
    """Also where a callback before the monitor is the first to see the exception, the journal has the samples that
    waited, and the episode that they began, before the one line that says how the fit ended."""

    def fail(step: int, module: Net) -> None:
        poison(step, module)
        if step == 9:
            raise KeyError("nine")

    with pytest.raises(KeyError, match="nine"):
        fit(tmp_path, Net(), BatchNormRecalibration(), AtStep(fail), alone())
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "lightning_bn.jsonl").read_text().splitlines()]
    assert kinds[-12:] == [*["sample"] * 9, "rule", "episode", "end"]
    assert kinds.count("end") == 1


def test_a_monitor_that_fails_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stops it, the samples that it had taken are in the table and in the files; the fit goes on."""
    monkeypatch.delenv(RERAISE)
    real, kept = LayerCollector.keep, []

    def keep(self: LayerCollector) -> None:
        if len(kept) == 9:
            raise ZeroDivisionError("ten")
        kept.append(real(self))

    monkeypatch.setattr(LayerCollector, "keep", keep)
    monitor = alone()
    with pytest.warns(UserWarning, match="ActivationStatsMonitor has stopped, .*ZeroDivisionError: ten"):
        fit(tmp_path, Net(), monitor)
    assert [row["step"] for row in monitor.table()] == [step for step in range(9) for _ in range(2)]
    assert len((tmp_path / "activation_stats.csv").read_text().splitlines()) == 1 + 2 * 9
    samples = [line for line in (tmp_path / "lightning_bn.jsonl").read_text().splitlines() if '"kind":"sample"' in line]
    assert len(samples) == 9


def test_samples_far_apart_do_not_wait(tmp_path: Path) -> None:
    """With every_n_steps=4 each is written at its step."""

    def count(step: int, module: Net) -> None:
        file = tmp_path / "activation_stats.csv"
        assert len(file.read_text().splitlines() if file.exists() else [0]) == 1 + 2 * ((step + 3) // 4)

    monitor = ActivationStatsMonitor(every_n_steps=4, activations=False, verbose=False)
    fit(tmp_path, Net(), AtStep(count), monitor)
