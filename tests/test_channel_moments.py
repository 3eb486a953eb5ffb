"""The moments of one batch, in every layout, against naive float64 loops."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from torch import nn

from lightning_bn import recalibrate, torch_internals
from lightning_bn.channel_moments import _device_moments, channel_moments
from lightning_bn.recalibration import measuring

SHAPES = [
    (1, 3),
    (2, 3),
    (33, 3),
    (3000, 7),
    (5000, 2),
    (4, 3, 1),
    (4, 3, 7),
    (6, 3, 4, 5),
    (6, 3, 1, 1),
    (700, 2, 3, 3),
    (3, 2, 3, 4, 5),
    (2, 300, 40),
]


def layouts(data: torch.Tensor) -> list[torch.Tensor]:
    """Contiguous, channels last, and strided."""
    found = [data, data.movedim(1, -1).contiguous().movedim(-1, 1)]
    return [*found, torch.stack((data, data), -1)[..., 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_are_exact_in_every_layout(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Mean to 1e-6 standard deviations, biased variance to 1e-6."""
    data = (torch.randn(shape) * 2 + 3).to(dtype)
    values = oracles.channels(data)
    truth = torch.tensor(sum(values) / len(values))
    biased = torch.tensor(sum((row - truth.numpy()) ** 2 for row in values) / len(values))
    for layout in layouts(data):
        mean, var = channel_moments(layout)
        assert ((mean.double() - truth).abs() <= 1e-6 * biased.sqrt() + 1e-6).all()
        torch.testing.assert_close(var.double(), biased, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("shape", [(60, 3), (6000, 3), (60, 3, 5), (60, 3, 4, 8), (6, 300, 4, 4)], ids=str)
def test_a_mean_far_from_zero_is_no_matter(shape: tuple[int, ...]) -> None:
    """Mean 1000, standard deviation 0.01, in float32 whose digits there are 6e-5 apart: the variance of what is stored,
    to 1e-4."""
    data = 1000 + 0.01 * torch.randn(shape)
    for layout in layouts(data):
        _, var = channel_moments(layout)
        _, truth = oracles.mean_and_unbiased_variance(oracles.channels(data))
        count = data.numel() // data.shape[1]
        assert (var.double() / (torch.tensor(truth) * (count - 1) / count) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(40, 3), (9000, 3), (8, 3, 2), (8, 3, 6, 6)], ids=str)
def test_what_is_not_finite_shows_in_the_variance_of_its_channel_alone(shape: tuple[int, ...], poison: float) -> None:
    """One value is enough; constant data has variance zero."""
    data = torch.ones(shape) * 5
    data[2, 1] = poison
    for layout in layouts(data):
        mean, var = channel_moments(layout)
        assert var.isfinite().tolist() == [True, False, True]
        assert var[[0, 2]].tolist() == [0.0, 0.0]
        assert mean[[0, 2]].tolist() == [5.0, 5.0]


def test_without_the_undocumented_kernels_the_moments_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that has neither computes them by what is public."""
    data = [
        torch.randn(50, 3),
        torch.randn(5000, 3),
        torch.randn(8, 3, 2),
        torch.randn(8, 3, 6, 6),
        torch.randn(8, 3, 6, 6).bfloat16(),
    ]
    before = [channel_moments(one) for one in data]
    monkeypatch.setattr(torch_internals, "_update_stats", None)
    monkeypatch.setattr(torch_internals, "_group_norm", None)
    for one, expected in zip(data, before, strict=True):
        for value, known in zip(channel_moments(one), expected, strict=True):
            torch.testing.assert_close(value.double(), known.double(), rtol=1e-6, atol=1e-6)


def test_there_is_no_graph() -> None:
    """Moments of data with grad have none."""
    assert not any(value.requires_grad for value in channel_moments(torch.randn(4, 3, 5, 5, requires_grad=True)))


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (32, 16, 16, 16)], ids=str)
def test_images_very_far_from_zero(shape: tuple[int, ...]) -> None:
    """Mean 10000, standard deviation 0.01: the variance to 1e-4, in every layout, and by the way of other devices,
    around a first value."""
    data = 1e4 + 0.01 * torch.randn(shape)
    values = data.double().transpose(0, 1).flatten(1).numpy()
    means = [sum(row) / len(row) for row in values]
    truth = torch.tensor(
        [sum((x - mean) ** 2 for x in row) / len(row) for row, mean in zip(values, means, strict=True)]
    )
    found = [channel_moments(layout)[1] for layout in layouts(data)]
    for var in [*found, _device_moments(data)[1]]:
        assert (var.double() / truth - 1).abs().max() < 1e-4


@pytest.mark.parametrize("exact", [False, True])
def test_recalibration_of_images_very_far_from_zero_by_the_way_of_other_devices(
    monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    """Mean 10000, standard deviation 0.01: the running variance to 1e-4, from batches whose means differ."""
    monkeypatch.setattr(measuring, "channel_moments", _device_moments)
    data = 1e4 + 0.01 * torch.randn(64, 3, 8, 8)
    layer = nn.BatchNorm2d(3)
    recalibrate(layer, data.split(16), exact=exact, progress=False)
    truth = data.double().transpose(0, 1).flatten(1).numpy().var(1, ddof=1)
    assert np.abs(layer.running_var.double().numpy() / truth - 1).max() < 1e-4
