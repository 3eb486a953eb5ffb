"""From pooled moments to the numbers of each layer: on the host, flat for all layers at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.activations.pooling import Key, Pool

__all__ = ["Summary", "summarise", "weights_and_biases"]

Array = NDArray[np.float64]

# A batch norm's weight starts at 1; below a hundredth of that the channel hardly reaches the next layer.
NEAR_ZERO = 0.01


@dataclass(frozen=True)
class Summary:
    """The statistics of one layer, as `ActivationStats` defines them; NaN where there were too few values."""

    mean: float
    std: float
    abs_max: float
    zero_fraction: float
    saturated_fraction: float
    nonfinite: float
    dead: NDArray[np.bool_]  # (C,)
    channel_mean: Array  # (C,)
    channel_std: Array  # (C,), unbiased


def summarise(pool: Pool) -> dict[Key, Summary]:
    """Return the statistics of each key of a pool that has come to the host."""
    widths = np.array([key.width for key in pool.keys])
    starts = np.cumsum(widths) - widths
    count, mean, m2, zeros = pool.channels.double().numpy()
    abs_max, saturated = pool.layers.double().numpy()
    seen = np.array(pool.seen, dtype=np.float64)

    def total(values: Array) -> Array:
        return np.add.reduceat(values, starts)

    with np.errstate(divide="ignore", invalid="ignore"):
        n, values = total(count), seen * widths
        layer_mean = total(count * mean) / n
        layer_m2 = total(m2 + count * (mean - np.repeat(layer_mean, widths)) ** 2)
        columns = (
            layer_mean,
            np.where(n > 1, np.sqrt(layer_m2 / (n - 1)), np.nan),
            np.where(n > 0, abs_max, np.nan),
            total(zeros) / values,
            saturated / values,
            values - n,
        )
        dead = zeros == np.repeat(seen, widths)
        channel_mean = np.where(count > 0, mean, np.nan)
        channel_std = np.where(count > 1, np.sqrt(m2 / (count - 1)), np.nan)
    by_key = zip(*(column.tolist() for column in columns), strict=True)
    vectors = (np.split(vector, starts[1:]) for vector in (dead, channel_mean, channel_std))
    return {key: Summary(*numbers, *parts) for key, numbers, *parts in zip(pool.keys, by_key, *vectors, strict=True)}


def weights_and_biases(
    norms: Mapping[str, _BatchNorm], weights: Tensor, biases: Tensor
) -> dict[str, dict[str, float | None]]:
    """Return the range of the affine parameters of each batch norm, from all of them one after the other."""
    found: dict[str, dict[str, float | None]] = {name: {} for name in norms}
    for kind, flat in (("weight", weights), ("bias", biases)):
        names = [name for name, norm in norms.items() if getattr(norm, kind) is not None]
        if not names:
            continue
        widths = np.array([norms[name].num_features for name in names])
        starts = np.cumsum(widths) - widths
        numbers = flat.float().numpy()
        columns = {
            f"{kind}_min": np.minimum.reduceat(numbers, starts),
            f"{kind}_max": np.maximum.reduceat(numbers, starts),
        }
        if kind == "weight":
            columns["weight_near_zero"] = (
                np.add.reduceat(np.where(np.isnan(numbers), np.nan, abs(numbers) < NEAR_ZERO), starts) / widths
            )
        for column, values in columns.items():
            for name, value in zip(names, values.tolist(), strict=True):
                found[name][column] = None if value != value else value
    return found
