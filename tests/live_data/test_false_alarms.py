"""The alarm rate on clean data is what was asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_bn import drift, recalibrate

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
from drift import p_values

CUTS, BATCHES = 20, 100


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images / 16).float().unsqueeze(1), torch.tensor(data.target)


def trained(images: Tensor, labels: Tensor) -> nn.Sequential:
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)),
    )
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(5):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    return net.eval()


def one_by_one(images: Tensor, size: int) -> Iterator[Tensor]:
    """Batches of independent images, as rows."""
    return iter(torch.randint(len(images), (BATCHES, size)))


def test_the_shortcut_is_drift() -> None:
    """The p-values that the other test counts are those of `drift` for the same images."""
    torch.manual_seed(0)
    images, labels = digits()
    net = trained(images[:400], labels[:400])
    recalibrate(net, images[400:1000].split(100), spread=True, progress=False)
    state = torch.get_rng_state()
    found = p_values(net, images[1000:1100], one_by_one(images[1000:1100], 1))
    torch.set_rng_state(state)
    assert found == [drift(net, images[[1000 + row]]).p for row in torch.randint(100, (BATCHES, 1))[:, 0].tolist()]


@pytest.mark.timeout(300)
def test_the_alarm_rate_is_what_was_asked_for() -> None:
    """Within a factor of 1.5, on 2,000 held-out batches of each size, up to two standard errors over the cuts: the data
    that the network was not trained on is cut in two 20 times, one half for the spread, the other for the batches."""
    torch.manual_seed(0)
    images, labels = digits()
    order = torch.randperm(len(labels))
    net = trained(images[order[: len(order) * 2 // 5]], labels[order[: len(order) * 2 // 5]])
    rest = images[order[len(order) * 2 // 5 :]]
    found: dict[int, list[float]] = {1: [], 4: [], 16: [], 64: []}
    for _ in range(CUTS):
        known, live = rest[torch.randperm(len(rest))].chunk(2)
        recalibrate(net, known.split(250), spread=True, progress=False)
        for size, values in found.items():
            values += p_values(net, live, one_by_one(live, size))

    for size, values in found.items():
        for alarm in (0.05, 0.01):
            rates = (np.array(values).reshape(CUTS, BATCHES) <= alarm).mean(1)
            error = 2 * rates.std(ddof=1) / sqrt(CUTS)
            assert rates.mean() - error <= alarm * 1.5, (size, alarm, rates.mean(), error)
            assert rates.mean() + error >= alarm / 1.5, (size, alarm, rates.mean(), error)
