"""One statistic, layer by step: its limits, and how columns are thinned so that no short illness is lost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of a badness: a value beyond its limits comes before every value within them.
_SICK = 1e6


def distances(values: NDArray[Any], usual: Any, log: Any) -> NDArray[np.float64]:
    """Return how far values are from `usual` ones: by their ratio to them where `log`, else by their difference; NaN
    where there is none. `usual` and `log` are one for all, or a row of one for each column."""
    with np.errstate(invalid="ignore", over="ignore"):
        ratios = np.log(np.maximum(values, 1e-38) / np.where(usual == 0, 1.0, usual))
        found: NDArray[np.float64] = np.abs(np.where(log, ratios, values - usual))
    return found


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Which values of a statistic are sick, and which of two is worse."""

    low: float = -np.inf
    """Below it a layer is sick."""
    high: float = np.inf
    """Above it a layer is sick."""
    healthy: float | None = 0.0
    """The best value that a layer can have; None: what is usual among the layers."""
    log: bool = False
    """Whether values are far from healthy by their ratio to it, and not by their difference from it."""

    def sick(self, values: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which values are beyond the limits; a missing one (NaN) is not."""
        return (values < self.low) | (values > self.high)

    def usual(self, values: NDArray[Any]) -> float:
        """Return what values are healthy by: the median of the finite ones, where no value is in itself."""
        if self.healthy is not None:
            return self.healthy
        finite = values[np.isfinite(values)]
        return float(np.median(finite)) if finite.size else 0.0

    def distance(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Return how far each value is from healthy; NaN where there is none."""
        return distances(values.astype(np.float64), self.usual(values), self.log)

    def badness(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Return how bad each value is: infinite ones before sick ones, these before all within the limits, which go by
        their distance from healthy; -1 where there is none."""
        bad = np.minimum(self.distance(values), _SICK / 2) + _SICK * self.sick(values)
        return np.where(np.isnan(values), -1.0, np.where(np.isinf(values), 2 * _SICK, bad))


@dataclass(frozen=True)
class Grid:
    """L layers by T columns; a column stands for one sample, or for several of which each layer's worst is kept."""

    layers: tuple[str, ...]
    first: NDArray[np.int64]
    """(T,), the step of the first sample that a column stands for."""
    last: NDArray[np.int64]
    """(T,), that of the last one."""
    values: NDArray[Any]
    """(L, T), floating; NaN where there is none."""
    nans: NDArray[np.bool_]
    """(L, T), where the value was NaN."""
    warming: NDArray[np.bool_]
    """(L, T), where a known start explains the value."""
    samples: int
    """How many there were before thinning."""

    def thinned(self, columns: int, limits: Limits) -> Grid:
        """Return at most `columns` columns. NaN is worst of all; what is in warm-up is worse than nothing, and no
        more."""
        count = len(self.first)
        if count <= columns:
            return self
        starts = np.unique(np.linspace(0, count, max(columns, 1), endpoint=False).astype(int))
        bad = np.where(self.nans, 3 * _SICK, limits.badness(self.values))
        bad = np.where(self.warming & ~self.nans, np.minimum(bad, 1e-3), bad)
        picks = [
            start + bad[:, start:stop].argmax(axis=1) for start, stop in zip(starts, [*starts[1:], count], strict=True)
        ]
        chosen = np.stack(picks, axis=1) if self.layers else np.zeros((0, len(starts)), dtype=int)
        rows = np.arange(len(self.layers))[:, None]
        return replace(
            self,
            first=self.first[starts],
            last=self.last[np.append(starts[1:], count) - 1],
            values=self.values[rows, chosen],
            nans=self.nans[rows, chosen],
            warming=self.warming[rows, chosen],
        )

    def within(self, first: int, last: int) -> Grid:
        """Return the columns from one step to another."""
        kept = (self.last >= first) & (self.first <= last)
        return Grid(
            self.layers,
            self.first[kept],
            self.last[kept],
            self.values[:, kept],
            self.nans[:, kept],
            self.warming[:, kept],
            int(kept.sum()),
        )
