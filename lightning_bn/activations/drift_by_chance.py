"""By how much batches differ from each other by chance, learned from sample to sample, so that drift has a z."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_bn.activations.drift import Drift
from lightning_bn.activations.pool_to_host import Array

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
        self._layers: list[_Known] = []

    def update(self, drift: Drift, widths: NDArray[np.int64]) -> Array:
        """Take a sample in, and return the z of mean and variance of each norm, (L, 2): the root mean square over
        channels of its drift, divided by that of chance as the earlier samples show it; NaN while these are few.

        Args:
            drift: of L norms.
            widths: (L,), their channels.
        """
        if [len(each.newest[0]) for each in self._layers] != list(widths):
            self._layers = [_Known(np.full((2, width), np.nan)) for width in widths]
        now = np.stack((drift.shift, drift.log_ratio))
        ends = np.cumsum(widths)
        parts = (now[:, start:end] for start, end in zip(ends - widths, ends, strict=True))
        return np.array([known.update(part) for known, part in zip(self._layers, parts, strict=True)]).reshape(-1, 2)


@dataclass
class _Known:
    newest: Array  # (2, C), shift and log ratio of the last sample, NaN before it
    variance: Array | None = None  # (2,), by chance, mean over channels
    pairs: int = 0

    def update(self, now: Array) -> Array:
        if not np.isfinite(now).all():
            return np.full(2, np.nan)
        z = np.full(2, np.nan)
        if self.variance is not None and self.pairs >= LEAST:
            z = np.sqrt(np.square(now).mean(1) / self.variance)
        found = np.square(now - self.newest).mean(1) / 2
        self.newest = now
        if np.isfinite(found).all():
            self.pairs += 1
            old = np.zeros(2) if self.variance is None else self.variance
            self.variance = old + (found - old) / min(self.pairs, _MEMORY)
        return z
