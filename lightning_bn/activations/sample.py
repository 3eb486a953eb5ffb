"""One sample: a row for each place in the network, a column for each statistic, and a state for each cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_bn.activations.pool_to_host import Array, Mask
from lightning_bn.activations.registry import COLUMNS, STATISTICS

States = NDArray[np.int8]
ByRow: TypeAlias = Mapping[str, tuple[Array, Array]]

_PLACES = [COLUMNS.index(name) for name in STATISTICS]
_LOW = np.array([statistic.low for statistic in STATISTICS.values()])
_HIGH = np.array([statistic.high for statistic in STATISTICS.values()])
_LIMITED = [COLUMNS.index(name) for name, each in STATISTICS.items() if each.low > 0 or np.isfinite(each.high)]

ABSENT, KNOWN, WARM_UP, SHOWN = range(4)
"""States of a cell: the statistic does not apply to the row; it does; a known start explains its value; no limit holds
for it."""


@dataclass(frozen=True)
class Sample:
    """What was measured at one step, or in one evaluation, of R rows."""

    layers: tuple[str, ...] = ()
    """Names of the rows, in forward order."""
    modules: tuple[str, ...] = ()
    """By row, the name of the module in the model."""
    values: Array = field(default_factory=lambda: np.empty((0, len(COLUMNS))))
    """(R, len(COLUMNS)); NaN where there is none."""
    states: States = field(default_factory=lambda: np.empty((0, len(COLUMNS)), dtype=np.int8))
    """(R, len(COLUMNS)): `ABSENT`, `KNOWN`, `WARM_UP` or `SHOWN`."""
    of_channels: Callable[[], ByRow] = dict
    of_drift: Callable[[], ByRow] = dict
    histograms: Mapping[str, Tensor] = field(default_factory=dict)
    """By row, counts in the buckets of `activations.histogram_edges`."""

    @cached_property
    def channels(self) -> ByRow:
        """By row, mean and *unbiased* standard deviation of each channel, (C,) each; made where somebody asks."""
        return self.of_channels()

    @cached_property
    def channel_drift(self) -> ByRow:
        """By row of a batch norm, shift of the mean and log ratio of the variances of each channel, (C,) each; NaN
        where it took no batch in."""
        return self.of_drift()

    @classmethod
    def of(cls, rows: Mapping[str, Mapping[str, float | None]]) -> Sample:
        """Return a sample of rows by name, which have the statistics that they name and are not None."""
        values = np.full((len(rows), len(COLUMNS)), np.nan)
        states = np.full(values.shape, ABSENT, dtype=np.int8)
        for place, row in enumerate(rows.values()):
            for name, value in row.items():
                if value is not None:
                    values[place, COLUMNS.index(name)], states[place, COLUMNS.index(name)] = value, KNOWN
        return cls(tuple(rows), tuple(rows), values, states)

    @property
    def rows(self) -> dict[str, dict[str, float | None]]:
        """By layer, a value for each of `COLUMNS`; None where it does not apply, NaN where there is none."""
        return dict(zip(self.layers, dicts(self.values, self.states), strict=True))

    def column(self, name: str) -> tuple[Array, Mask]:
        """Return the values of a statistic, (R,), and which of them its limits hold for or would, but for warm-up."""
        place = COLUMNS.index(name)
        return self.values[:, place], is_judged(self.states[:, place])

    def is_limited(self) -> Mask:
        """Return which rows have a statistic with limits: (R,)."""
        found: Mask = np.any(is_judged(self.states[:, _LIMITED]), axis=1)
        return found

    def sick(self) -> Mask:
        """Return which cells are beyond their limits and not in warm-up: (R, len(STATISTICS))."""
        values, states = self.values[:, _PLACES], self.states[:, _PLACES]
        found: Mask = ((values < _LOW) | (values > _HIGH)) & (states == KNOWN)
        return found


def is_judged(states: States) -> Mask:
    """Return which cells have a value that stands for its layer: known ones, also in warm-up."""
    found: Mask = (states == KNOWN) | (states == WARM_UP)
    return found


def dicts(values: Array, states: States) -> Iterator[dict[str, float | None]]:
    """Yield a row of a table for each row of a sample."""
    for numbers, applies in zip(values.tolist(), (states != ABSENT).tolist(), strict=True):
        yield {name: value if has else None for name, value, has in zip(COLUMNS, numbers, applies, strict=True)}


def warm_ups(states: States) -> list[str]:
    """Return, by row, the names of the statistics that are in warm-up, with spaces between them."""
    found = [""] * len(states)
    for row, column in np.argwhere(states == WARM_UP).tolist():
        found[row] += f" {COLUMNS[column]}" if found[row] else COLUMNS[column]
    return found
