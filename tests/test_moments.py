"""Moments merge into those of the whole, however the data were cut and in whatever order."""

from __future__ import annotations

import random

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bn.moments import Moments, wide_dtype


def spoiled(moments: Moments) -> Moments:
    return Moments(moments.count, moments.mean, moments.m2 * 1.001)


def check(moments: Moments, values: oracles.Array, rtol: float = 1e-9) -> None:
    mean, var = oracles.mean_and_unbiased_variance(values)
    assert moments.count.item() == len(values)
    np.testing.assert_allclose(moments.mean.double(), mean, rtol=rtol, atol=rtol * np.abs(values).max())
    np.testing.assert_allclose(moments.variance(unbiased=True).double(), var, rtol=rtol)
    np.testing.assert_allclose(
        moments.variance(unbiased=False).double(), var * (len(values) - 1) / len(values), rtol=rtol
    )


@settings(max_examples=50, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(lambda cuts: sum(cuts) > 1),
    offset=st.floats(-1e4, 1e4),
    seed=st.integers(0, 10_000),
)
def test_any_cut_in_any_order(cuts: list[int], offset: float, seed: int) -> None:
    """Split anyhow, empty parts included, and merged in any order: the whole's moments."""
    data = torch.randn(sum(cuts), 3, dtype=torch.float64) + offset
    parts = [Moments.of(part) for part in data.split(cuts)]
    random.Random(seed).shuffle(parts)
    while len(parts) > 1:
        one, other = (parts.pop(random.Random(seed).randrange(len(parts))) for _ in range(2))
        parts.append(one.merge(other))
    check(parts[0], oracles.channels(data), rtol=1e-6)


def test_large_mean(device: torch.device) -> None:
    """Mean 1000 and standard deviation 0.01 in float32 keep their variance, which E[x^2] - E[x]^2 loses whole."""
    data = torch.randn(4096, 2, device=device) * 0.01 + 1000
    parts = [Moments.of(part).wide() for part in data.split(32)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert merged.mean.dtype == wide_dtype(device)
    _, var = oracles.mean_and_unbiased_variance(oracles.channels(data))
    np.testing.assert_allclose(merged.variance(unbiased=True).cpu().double(), var, rtol=1e-3)


def test_mask_is_packing() -> None:
    """The moments of the valid positions are those of a tensor of only these, whatever stands in the others."""
    data, mask = torch.randn(4, 3, 5, dtype=torch.float64), torch.rand(4, 5) > 0.4
    data[~mask.unsqueeze(1).expand_as(data)] = float("nan")
    check(Moments.of(data, mask), oracles.channels(data)[mask.reshape(-1).numpy()])


def test_empty_is_the_identity() -> None:
    """Merging with no data changes nothing, on either side, and no data at all is zeros."""
    some, none = Moments.of(torch.randn(5, 2)), Moments.of(torch.empty(0, 2))
    for merged in (some.merge(none), none.merge(some)):
        assert torch.equal(merged.mean, some.mean)
        assert torch.equal(merged.m2, some.m2)
    assert torch.equal(none.merge(none).mean, torch.zeros(2))


def test_from_variance_is_the_inverse() -> None:
    """Count, mean and unbiased variance give the moments back."""
    moments = Moments.of(torch.randn(7, 2, dtype=torch.float64))
    again = Moments.from_variance(moments.count, moments.mean, moments.variance(unbiased=True))
    torch.testing.assert_close(again.m2, moments.m2)


def test_oracle_goes_red() -> None:
    """The comparison fails on a second moment that is off by a thousandth."""
    data = torch.randn(9, 2, dtype=torch.float64)
    with pytest.raises(AssertionError):
        check(spoiled(Moments.of(data)), oracles.channels(data))


def test_a_mean_very_far_from_zero() -> None:
    """Mean 10000, standard deviation 0.01, in parts as over ranks: the variance to 1e-4, which a mean in float32 gives
    to 3e-3."""
    data = 1e4 + 0.01 * torch.randn(64, 3, 8, 8)
    whole = Moments.of(data[:7], wide=True)
    for part in data[7:].split(19):
        whole = whole.merge(Moments.of(part, wide=True))
    truth = data.double().movedim(1, -1).reshape(-1, 3).var(0)
    assert (whole.variance(unbiased=True).double() / truth - 1).abs().max() < 1e-4
