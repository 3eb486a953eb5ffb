"""The z beside the drift of a batch norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fitting import fit
from small_data import loader
from torch import Tensor, nn

from lightning_bn import ActivationStatsMonitor
from lightning_bn.activations.collector import LayerCollector
from lightning_bn.activations.drift import Drift, DriftMeter
from lightning_bn.activations.drift_by_chance import LEAST, DriftByChance

STEPS = 400


def measured(size: int, *, channels: int = 16, positions: int = 1, lag: float = 0.0) -> np.ndarray:
    """Return z of mean and variance in each step, (STEPS, 2), of a norm whose batches' mean moves by `lag` a step."""
    torch.manual_seed(0)
    layer, chance = nn.BatchNorm2d(channels), DriftByChance()
    meter = DriftMeter([layer])
    found = []
    for step in range(STEPS):
        meter.start()
        images = torch.randn(size, channels, 1, 1) + 0.3 * torch.randn(size, channels, positions, positions)
        layer(images + lag * step)
        found.append(chance.update(meter.measure(), np.array([channels]))[0])
    return np.array(found)


@pytest.mark.parametrize(("size", "positions"), [(4, 1), (4, 6), (32, 1), (256, 3)])
@pytest.mark.parametrize("channels", [1, 64])
def test_the_limit_holds_for_any_size_of_batch(size: int, positions: int, channels: int) -> None:
    """Of statistics that fit, it is about 1 and hardly ever beyond 4, also where positions of an image are alike."""
    z = measured(size, channels=channels, positions=positions)
    assert np.isnan(z[: LEAST + 1]).all()
    z = z[100:]  # the 0/1 start is forgotten
    rms = np.sqrt(np.square(z).mean(0))
    assert (rms > 0.85).all()
    assert (rms < 1.4).all()
    assert ((z > 4).mean(0) < 0.01).all()


def test_a_lag_that_lasts_is_no_chance() -> None:
    """A mean that moves by 0.02 deviations a step leaves the running mean 0.2 behind: that is chance for 4 samples, and
    not for 256. Drift itself is less than in the smaller batch."""
    few, many = (np.nanmedian(measured(size, lag=0.02)[100:], axis=0) for size in (4, 256))
    assert few[0] < 1.5
    assert many[0] > 2.5


def test_chance_is_that_of_the_newest_samples() -> None:
    """Batches that have grown 64 times as large differ 8 times less; 150 of them on, z is about 1 again."""
    generator, chance, found = np.random.default_rng(0), DriftByChance(), []
    for step in range(350):
        shift, log_ratio = generator.normal(size=(2, 64)) * (1.0 if step < 200 else 0.125)
        drift = Drift(
            np.zeros((1, 4)), np.zeros((1, 4)), np.ones(1, bool), np.zeros(1), shift=shift, log_ratio=log_ratio
        )
        found.append(chance.update(drift, np.array([64]))[0])
    assert 0.8 < np.mean(found[100:200]) < 1.25
    assert np.mean(found[205:210]) < 0.3
    assert 0.8 < np.mean(found[-20:]) < 1.25


@pytest.mark.parametrize("moves", ["mean", "var"])
def test_each_column_is_of_what_moves(moves: str) -> None:
    """A mean that wanders off is no chance, and leaves the variance as it was; and the other way round."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(16))
    collector = LayerCollector(model, {"0": model[0]})
    for step in range(40):
        collector.attach()
        inputs = torch.randn(256, 16)
        model(inputs + step if moves == "mean" else inputs * 1.1**step)
        collector.detach()
        row = collector.collect().rows["0"]
    z = {name: row[f"drift_{name}_z"] for name in ("mean", "var")}
    assert z.pop(moves) > 4
    assert all(other < 2 for other in z.values())


def test_the_monitor_has_it() -> None:
    """In its table, from the tenth sample on."""
    monitor = ActivationStatsMonitor(every_n_steps=1)
    fit(monitor, max_epochs=3, train=loader(8))
    rows = [row for row in monitor.table() if row["layer"] == "bn1" and row["stage"] == "train"]
    z = [row["drift_mean_z"] for row in rows]
    assert all(each is None or np.isnan(each) for each in z[: LEAST + 1])
    assert all(0 < each < 10 for each in z[LEAST + 1 :])
    assert len(z) == 18


def test_other_widths_begin_anew() -> None:
    """As after pruning; and a sample that is not finite is left out."""
    chance, layer = DriftByChance(), nn.BatchNorm1d(3)

    def sample(inputs: Tensor) -> np.ndarray:
        meter = DriftMeter([layer])
        meter.start()
        layer(inputs)
        return chance.update(meter.measure(), np.array([layer.num_features]))[0]

    for _ in range(LEAST + 1):
        sample(torch.randn(8, 3))
    assert np.isfinite(sample(torch.randn(8, 3))).all()
    assert np.isnan(sample(torch.full((8, 3), torch.inf))).all()
    layer.reset_running_stats()
    assert np.isfinite(sample(torch.randn(8, 3))).all()
    layer = nn.BatchNorm1d(5)
    assert np.isnan(sample(torch.randn(8, 5))).all()
