"""One statistic of one stage, layer by step, thinned so that no short illness is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_bn.journal.sample import Sample, columns_of

__all__ = ["Grid", "Limits", "make_grid", "make_row"]

_SICK = 1e6  # of a distance: a value beyond its limits stands before every value that is within


@dataclass(frozen=True)
class Limits:
    """Which values of a statistic are sick, and which of two is worse."""

    low: float = -np.inf
    high: float = np.inf
    healthy: float | None = 0.0
    log: bool = False

    @classmethod
    def of(cls, statistic: Mapping[str, Any]) -> Limits:
        """Return those of an entry of the journal's ``statistics`` line."""
        low, high, healthy = (statistic.get(name) for name in ("low", "high", "healthy"))
        return cls(
            low=-np.inf if low is None else float(low),
            high=np.inf if high is None else float(high),
            healthy=None if healthy is None else float(healthy),
            log=bool(statistic.get("log")),
        )

    def sick(self, values: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return which values are beyond the limits; one that is missing (NaN) is not."""
        return (values < self.low) | (values > self.high)

    def badness(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return how bad each value is: any beyond a limit before all within, then by the distance from healthy; -1
        where there is no value."""
        known = values[np.isfinite(values)]
        healthy = self.healthy if self.healthy is not None else float(np.median(known)) if known.size else 1.0
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.log:
                distance = np.abs(np.log(np.maximum(values, 1e-38) / (healthy or 1.0))).astype(np.float64)
            else:
                distance = np.abs(values.astype(np.float64) - healthy)
        bad = np.minimum(distance, _SICK / 2) + _SICK * self.sick(values)
        return np.where(np.isnan(values), -1.0, np.where(np.isinf(values), 2 * _SICK, bad))


@dataclass(frozen=True)
class Grid:
    """Layers by columns; a column stands for one sample, or for several of which each layer's worst is kept."""

    layers: tuple[str, ...]
    first: NDArray[np.int64]
    """The step of the first sample that a column stands for."""
    last: NDArray[np.int64]
    values: NDArray[np.float32]
    """(L, T); NaN where there is none."""
    nans: NDArray[np.bool_]
    """Where the value was NaN."""
    warming: NDArray[np.bool_]
    samples: int
    """How many there were before thinning."""

    def thinned(self, columns: int, limits: Limits) -> Grid:
        """Return at most `columns` columns."""
        count = len(self.first)
        if count <= columns:
            return self
        starts = np.unique(np.linspace(0, count, max(columns, 1), endpoint=False).astype(int))
        bad = np.where(self.nans, 3 * _SICK, limits.badness(self.values))
        bad = np.where(self.warming & ~self.nans, np.minimum(bad, 1e-3), bad)
        picks = [
            start + bad[:, start:stop].argmax(axis=1) for start, stop in zip(starts, [*starts[1:], count], strict=True)
        ]
        chosen = np.stack(picks, axis=1) if len(self.layers) else np.zeros((0, len(starts)), dtype=int)
        rows = np.arange(len(self.layers))[:, None]
        return Grid(
            layers=self.layers,
            first=self.first[starts],
            last=self.last[np.append(starts[1:], count) - 1],
            values=self.values[rows, chosen],
            nans=self.nans[rows, chosen],
            warming=self.warming[rows, chosen],
            samples=self.samples,
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


def make_grid(samples: Sequence[Sample], statistic: str) -> Grid:
    """Return a statistic of all layers that have it, in forward order, at every sample of a stage."""
    having = [
        (sample, column) for sample, column in zip(samples, columns_of(samples, statistic), strict=True) if column
    ]
    # The newest sample has the layers in forward order; those that it lacks come behind.
    orders = dict.fromkeys(sample.rows for sample, _ in reversed(having))
    layers = dict.fromkeys(name for rows in orders for name in rows)
    places = {name: place for place, name in enumerate(layers)}
    into = {rows: np.array([places[name] for name in rows]) for rows in orders}
    values = np.full((len(layers), len(having)), np.nan, dtype=np.float32)
    nans, warming = np.zeros(values.shape, dtype=bool), np.zeros(values.shape, dtype=bool)
    for at, (sample, column) in enumerate(having):
        to = into[sample.rows]
        values[to, at] = column.values
        if column.nans:
            nans[to[list(column.nans)], at] = True
        warm = [row for row in sample.warming.get(statistic, ()) if 0 <= row < len(to)]
        if warm:
            warming[to[warm], at] = True
    kept: NDArray[np.bool_] = np.zeros(len(layers), dtype=bool)
    if having:
        kept = np.any(~np.isnan(values) | nans, axis=1)
    steps = np.array([sample.step for sample, _ in having], dtype=np.int64)
    names = tuple(name for name, keep in zip(layers, kept, strict=True) if keep)
    return Grid(names, steps, steps, values[kept], nans[kept], warming[kept], len(having))


def make_row(samples: Sequence[Sample], statistic: str, layer: str) -> Grid:
    """Return the grid of one layer, for which the other layers' numbers need not be read."""
    found = []
    for sample in samples:
        place = sample.place(layer)
        value = None if place is None else sample.value(statistic, place)
        if value is not None:
            found.append((sample.step, value, place in sample.warming.get(statistic, ())))
    if not found:
        none, flags = np.zeros(0, dtype=np.int64), np.zeros((0, 0), dtype=bool)
        return Grid((), none, none, np.zeros((0, 0), dtype=np.float32), flags, flags, 0)
    steps, numbers, warm = zip(*found, strict=True)
    values = np.array([numbers], dtype=np.float32)
    at = np.array(steps, dtype=np.int64)
    return Grid((layer,), at, at, values, np.isnan(values), np.array([warm]), len(found))
