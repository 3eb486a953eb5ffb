"""Naive float64 loops that say what the running statistics should be. They share no code with the package."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def channels(batch: object) -> Array:
    """Return (values, C) in float64 from a tensor (N, C, *spatial)."""
    data = np.asarray(batch.detach().double().cpu())  # type: ignore[attr-defined]
    return np.moveaxis(data, 1, -1).reshape(-1, data.shape[1])


def mean_and_unbiased_variance(values: Array) -> tuple[Array, Array]:
    """Two loops over the rows; no library's variance."""
    count = len(values)
    mean = sum(values) / count
    var = sum((row - mean) ** 2 for row in values) / (count - 1)
    return np.asarray(mean), np.asarray(var)


def window(batches: list[Array], size: int, pooled: bool) -> tuple[Array, Array]:
    """The statistics of the last `size` batches, from all of their data."""
    inside = batches[-size:]
    if pooled:
        return mean_and_unbiased_variance(np.concatenate(inside))
    each = [mean_and_unbiased_variance(batch) for batch in inside]
    return sum(mean for mean, _ in each) / len(each), sum(var for _, var in each) / len(each)


def cumulative(batches: list[Array], pooled: bool) -> tuple[Array, Array]:
    """The statistics of all batches."""
    return window(batches, len(batches), pooled)


def exponential(batches: list[Array], momentum: float, debias: bool, pooled: bool) -> tuple[Array, Array]:
    """The closed form: batch k of t weighs ``m (1-m)**(t-k)``, what the buffers start with ``(1-m)**t``, nothing where
    debiased."""
    t = len(batches)
    weights = [momentum * (1 - momentum) ** (t - k) for k in range(1, t + 1)]
    if pooled:
        return _discounted_samples(batches, weights, 0.0 if debias else (1 - momentum) ** t)
    start = 0.0 if debias else (1 - momentum) ** t
    scale = sum(weights) + start
    each = [mean_and_unbiased_variance(batch) for batch in batches]
    mean = sum(w * m for w, (m, _) in zip(weights, each, strict=True)) / scale
    var = (sum(w * v for w, (_, v) in zip(weights, each, strict=True)) + start * 1.0) / scale
    return np.asarray(mean), np.asarray(var)


def _discounted_samples(batches: list[Array], weights: list[float], start: float) -> tuple[Array, Array]:
    """Weighted mean and reliability-weighted unbiased variance, sample by sample; the start is one batch with mean 0
    and variance 1."""
    size, width = batches[0].shape
    # `size` values with mean 0 and unbiased variance 1 in every channel: half at -a, half at +a (one at 0 if odd).
    amplitude = np.sqrt((size - 1) / (2 * (size // 2)))
    pattern = np.array([-amplitude] * (size // 2) + [amplitude] * (size // 2) + [0.0] * (size % 2))
    data = [np.repeat(pattern[:, None], width, axis=1), *batches]
    per_sample = np.concatenate([np.full(len(part), w) for part, w in zip(data, [start, *weights], strict=True)])
    rows = np.concatenate(data)
    v1, v2 = per_sample.sum(), (per_sample**2).sum()
    mean = (per_sample[:, None] * rows).sum(0) / v1
    var = (per_sample[:, None] * (rows - mean) ** 2).sum(0) / (v1 - v2 / v1)
    return mean, var
