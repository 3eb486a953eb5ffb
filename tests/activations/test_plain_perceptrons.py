"""Perceptrons without batch norm, in which units are off from the draw of their weights on: healthy ones are silent,
and a layer that dies is named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fitting import trainer
from lightning.pytorch import LightningModule
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import ActivationStatsMonitor


def perceptron(*widths: int) -> nn.Sequential:
    """torch's default initialisation, as most tutorials leave it."""
    model, inputs = nn.Sequential(), 30
    for width in widths:
        model.extend([nn.Linear(inputs, width), nn.ReLU()])
        inputs = width
    return model.append(nn.Linear(inputs, 2))


class Fit(LightningModule):
    """At step 40, `off` of the units of layer 2 are given a bias that no input outweighs."""

    def __init__(self, model: nn.Sequential, off: slice | None = None) -> None:
        super().__init__()
        self.model, self.off = model, off

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.off is not None and self.global_step == 40:
            with torch.no_grad():
                self.model[2].bias[self.off] = -1e4
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.model(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def watched(model: nn.Sequential, off: slice | None = None) -> ActivationStatsMonitor:
    inputs, labels = load_breast_cancer(return_X_y=True)
    data = TensorDataset(torch.tensor(StandardScaler().fit_transform(inputs)).float(), torch.tensor(labels))
    monitor = ActivationStatsMonitor(verbose=False)
    fit = trainer(monitor, max_epochs=5, num_sanity_val_steps=0)
    fit.fit(Fit(model, off), DataLoader(data, 32, shuffle=True), DataLoader(data, 256))
    return monitor


@pytest.mark.parametrize("widths", [(256, 256), (32,) * 4], ids=str)
def test_a_healthy_perceptron_is_silent(widths: tuple[int, ...]) -> None:
    """The data is not that on which the limits were looked at, which come from a formula."""
    torch.manual_seed(1)
    assert watched(perceptron(*widths)).episodes() == []


def test_a_deep_one_is_silent_though_many_of_its_units_are_off() -> None:
    """More than the quarter which is the limit behind a batch norm."""
    torch.manual_seed(0)
    monitor = watched(perceptron(*(64,) * 8))
    assert monitor.episodes() == []
    assert max(row["dead_fraction"] or 0.0 for row in monitor.table()) > 0.25


def test_in_a_deep_network_half_of_the_units_are_off_from_the_start() -> None:
    """And never more by more than chance: counted in float64 over forty draws of a network of thirty layers."""
    torch.manual_seed(0)
    shares = []
    for _ in range(40):
        model, data = perceptron(*(64,) * 30).double(), torch.randn(256, 30, dtype=torch.float64)
        for layer in model[:-1]:
            data = layer(data)
        shares.append(float((data == 0).all(0).double().mean()))
    assert abs(sum(shares) / len(shares) - 0.5) < 0.05
    assert max(shares) < 0.5 + 4 * 0.5 / 64**0.5


@pytest.mark.parametrize(("off", "by"), [(slice(None), 44), (slice(46), 68)], ids=["all", "46 of 64"])
def test_a_layer_that_dies_is_named(off: slice, by: int) -> None:
    """By row and step, also where no more units are off than chance might have left off: these have fired before. Those
    that did so seldom take longer to be known as dead."""
    torch.manual_seed(0)
    first = watched(perceptron(64, 64, 64), off).episodes()[0]
    assert first.layer == "model.3"
    assert first.statistic in ("dead_fraction", "dormant_fraction", "zero_fraction")
    assert 40 <= first.first <= by
