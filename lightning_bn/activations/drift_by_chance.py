"""By how much batches differ from each other by chance, learned from sample to sample, so that drift has a z."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_bn.activations.drift import Drift
from lightning_bn.activations.pool_to_host import Array, Mask, silent_numbers

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

    def update(self, drift: Drift, widths: NDArray[np.int64]) -> Array:
        """Take a sample in, see `update_each`: (L, 2)."""
        z: Array = self.update_each([drift], widths)[0]
        return z

    @silent_numbers()
    def update_each(self, drifts: Sequence[Drift], widths: NDArray[np.int64]) -> Array:
        """Take T samples in, and return the z of mean and variance of each norm, (T, L, 2): the root mean square over
        channels of its drift, divided by that of chance as the earlier samples show it; NaN while these are few.

        A norm whose drift is not finite is left out of its sample; where widths are others, all begin anew.

        Args:
            drifts: of L norms.
            widths: (L,), their channels.
        """
        if not np.array_equal(widths, self._widths):
            self._begin(widths)
        starts = np.cumsum(widths) - widths
        now = np.stack([[each.shift, each.log_ratio] for each in drifts])  # (T, 2, S)
        is_finite: Mask = np.logical_and.reduceat(np.isfinite(now).all(1), starts, axis=-1)  # (T, L)
        before = np.concatenate((self._newest[None], now))
        for place in np.flatnonzero(~is_finite.all(-1)).tolist():
            before[place + 1] = np.where(is_finite[place].repeat(widths), now[place], before[place])
        self._newest = before[-1]
        squares = np.add.reduceat(np.square(now), starts, axis=-1) / widths
        found = np.add.reduceat(np.square(now - before[:-1]), starts, axis=-1) / widths / 2
        is_pair = np.logical_and.reduce(np.isfinite(found), axis=1)
        z = np.full((len(drifts), len(widths), 2), np.nan)
        for place in range(len(drifts)):
            known = is_finite[place] & (self._pairs >= LEAST)
            z[place] = np.where(known, np.sqrt(squares[place] / self._variance), np.nan).T
            self._pairs = self._pairs + is_pair[place]
            weight = 1 / np.clip(self._pairs, 1, _MEMORY)
            moved = self._variance + (found[place] - self._variance) * weight
            self._variance = np.where(is_pair[place], moved, self._variance)
        return z
