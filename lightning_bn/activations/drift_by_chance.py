"""By how much batches differ from each other by chance, learned from sample to sample, so that drift has a z."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_bn.activations.drift import Drift
from lightning_bn.activations.pool_to_host import Array, silent_numbers

LEAST = 8
"""Pairs of samples without which chance is not known."""
_MEMORY = 20


class DriftByChance:
    """The drift of norms in units of what it is by chance: of statistics that fit the batches it is about 1, however
    many samples are in a batch.

    A shift that lasts, as that of statistics that lag, cancels in the difference of two consecutive samples, and chance
    does not: half the square of the difference is its variance (von Neumann et al. 1941), here averaged over the last
    `_MEMORY` samples or so, and over channels.
    """

    def __init__(self) -> None:
        self._begin(np.empty(0, dtype=np.int64))

    def _begin(self, widths: NDArray[np.int64]) -> None:
        self._widths = widths
        self._newest = np.full((2, widths.sum()), np.nan)  # (2, S), shift and log ratio of the last sample
        self._variance = np.zeros((2, len(widths)))  # (2, L), by chance, mean over channels
        self._pairs = np.zeros(len(widths), dtype=np.int64)  # (L,), that it is of

    @silent_numbers()
    def update(self, drift: Drift, widths: NDArray[np.int64]) -> Array:
        """Take a sample in, and return the z of mean and variance of each norm, (L, 2): the root mean square over
        channels of its drift, divided by that of chance as the earlier samples show it; NaN while these are few.

        A norm whose drift is not finite is left out of this sample; where widths are others, all begin anew.

        Args:
            drift: of L norms.
            widths: (L,), their channels.
        """
        if not np.array_equal(widths, self._widths):
            self._begin(widths)
        starts = np.cumsum(widths) - widths
        now = np.stack((drift.shift, drift.log_ratio))
        is_finite = np.logical_and.reduceat(np.isfinite(now).all(0), starts)
        ratio = np.sqrt(np.add.reduceat(np.square(now), starts, axis=1) / widths / self._variance)
        z: Array = np.where(is_finite & (self._pairs >= LEAST), ratio, np.nan).T
        found = np.add.reduceat(np.square(now - self._newest), starts, axis=1) / widths / 2
        is_pair = np.isfinite(found).all(0)
        self._newest = np.where(is_finite.repeat(widths), now, self._newest)
        self._pairs += is_pair
        weight = 1 / np.clip(self._pairs, 1, _MEMORY)
        self._variance = np.where(is_pair, self._variance + (found - self._variance) * weight, self._variance)
        return z
