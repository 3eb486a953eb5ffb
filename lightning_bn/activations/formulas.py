"""Of which rows a statistic tells something, and the formulas that several of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_bn.activations.pool_to_host import Array, Channels, Mask, Norms

# A batch norm's weight starts at 1; below a hundredth of that the channel hardly reaches the next layer.
NEAR_ZERO = 0.01

# Standard deviations that a share may be off by chance: one layer in 30,000 is farther.
CHANCE = 4.0


def are_functions(found: Channels) -> Mask:
    return found.flags.is_function


def are_layers(found: Channels) -> Mask:
    return ~found.flags.is_input


def off_by_chance(found: Channels, off: Mask, limit: float) -> Mask:
    """Tell in which rows more than `limit` of the channels are off, and no more than the draw of their initial weights
    explains.

    Without a batch norm before it a channel may be given the same sign whatever the input, and the more so the deeper
    its layer is: then it is off with probability 1/2, by symmetry (Lu et al. 2020, "Dying ReLU and initialization").
    So half of a layer is explained, and what a binomial varies by; but not that half of its channels are off that have
    fired before.
    """
    share, bound = found.total(off) / found.widths, 0.5 + CHANCE * 0.5 / np.sqrt(found.widths)
    is_drawn = ~found.flags.is_centred & (found.total(found.died) <= 0.5 * found.widths)
    explained: Mask = is_drawn & (share > limit) & (share < np.minimum(bound, 1.0))
    return explained


def extent(found: Channels, which: Array) -> Array:
    return np.where(found.n > 0, which, np.nan)


def drift_value(column: int) -> Callable[[Norms], Array]:
    return lambda found: found.drift[:, column]


def have_run(found: Norms) -> Mask:
    return found.ran


def track(found: Norms) -> Mask:
    return found.tracks


def have_weight(found: Norms) -> Mask:
    return found.has_weight


def have_bias(found: Norms) -> Mask:
    return found.has_bias


def near_zero(weight: Array, starts: Any) -> Array:
    ends = np.append(starts[1:], len(weight))
    near = np.where(np.isnan(weight), np.nan, np.abs(weight) < NEAR_ZERO)
    share: Array = np.add.reduceat(near, starts) / (ends - starts)
    return share


def rms(weight: Array, starts: Any) -> Array:
    ends = np.append(starts[1:], len(weight))
    found: Array = np.sqrt(np.add.reduceat(np.square(weight), starts) / (ends - starts))
    return found


def distance(mean: Array, var: Array, running_mean: Array, running_var: Array, eps: Array) -> tuple[Array, Array]:
    """Return, per channel, ``(mean - running_mean) / sqrt(running_var + eps)`` and
    ``log((var + eps) / (running_var + eps))``, with *unbiased* variances."""
    running = running_var + eps
    return (mean - running_mean) / np.sqrt(running), np.log((np.maximum(var, 0) + eps) / running)


def summarise_drift(shift: Array, log_ratio: Array, widths: NDArray[np.int64]) -> Array:
    """Return the root mean square and the greatest absolute value over channels of both: (L, 4), in the order of
    `registry.DRIFT_STATISTICS`.

    Args:
        shift: (..., S), the channels of L layers one behind the other.
        log_ratio: (..., S), likewise.
        widths: (L,), channels of each layer.

    Several drifts of the same layers, in further dimensions, cost hardly more than one: (..., L, 4).
    """
    starts = np.cumsum(widths) - widths
    values = np.stack((shift, log_ratio), axis=-2)
    rms = np.sqrt(np.add.reduceat(np.square(values), starts, axis=-1) / widths)
    greatest = np.maximum.reduceat(np.abs(values), starts, axis=-1)
    found: Array = np.stack((rms, greatest), axis=-1).swapaxes(-3, -2).reshape(*rms.shape[:-2], len(widths), 4)
    return found
