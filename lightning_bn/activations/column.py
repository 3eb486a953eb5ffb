"""What a statistic is: a column of the table, which values are sick, what to do about them, how it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lightning_bn.activations.pool_to_host import Array, Mask

__all__ = ["Column", "Scale", "Statistic", "is_beyond"]

Source = Literal["activation", "gradient", "norm", "given"]
Family = Literal["numbers", "scale", "silence", "channel", "saturation", "drift", "affine", "gradient", "input"]


@dataclass(frozen=True)
class Scale:
    """How values become colours. The range is fixed, so that two runs, and two moments of one, can be compared by
    eye."""

    low: float
    high: float
    colours: str
    unit: str
    log: bool = False
    """Whether the range is in decades."""
    count: bool = False
    """Whether 0 is the value at the low end of a range in decades."""

    def place(self, values: Array) -> Array:
        """Return where on the range each value lies; a zero, which no decade holds, just below its low end."""
        if not self.log:
            return values
        floor = 10 ** (self.low if self.count else self.low - 0.01)
        return np.log10(np.where(values == 0, floor, values))


@dataclass(frozen=True)
class Column:
    """One column of the table: what it is measured of, how, and for which rows."""

    name: str
    of: Source
    value: Callable[[Any], Array]
    """Of `Channels`, `Norms` or, for what the model is given, `Channels.compared`: a value a row, NaN where there is
    none."""
    applies: Callable[[Any], Mask] | None = None
    """Likewise, which rows have the statistic; None: all."""


@dataclass(frozen=True, kw_only=True)
class Statistic(Column):
    """A column that is summed up over the layers: how it reads, which values are sick, what to do, how it is drawn."""

    label: str
    scale: Scale
    family: Family
    """What goes wrong, to tell which illnesses have one cause."""
    advice: str
    code: str = ""
    """Code that does so, where a line can."""
    rule: str = ""
    """The rule of `ModeCheck` whose page says more."""
    low: float = 0.0
    """Below it a layer is sick."""
    high: float = np.inf
    """Above it a layer is sick."""
    advice_low: str = ""
    """What to do where a layer is below its limit, if that differs."""
    judged: Callable[[Any], Mask] | None = None
    """Which rows the limits hold for; None: all that have the statistic."""
    rank: int = 5
    """Which of a layer's illnesses is told first, the smallest."""
    healthy: float | None = 0.0
    """The best value that a layer can have; None: what is usual among the layers."""
    log: bool = False
    """Whether values are far from healthy by their ratio to it, and not by their difference from it."""
    mapped: bool = True
    """Whether TensorBoard gets its heat map."""
    chart: str | None = None
    """The title of its chart in the Custom Scalars tab, if it has one."""
    band: bool = False
    """Whether that chart shows the median within the smallest and the largest, and not the worst and the median."""

    def distance(self, values: Array) -> Array:
        """Return how far each value is from healthy, to tell which is worst."""
        healthy = _median(values) or 1.0 if self.healthy is None else self.healthy
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.abs(np.log(values / healthy)) if self.log else np.abs(values - healthy)

    def is_sick(self, values: Array) -> Mask:
        """Return which values are beyond the limits; a missing one (NaN) is not."""
        return is_beyond(values, self.low, self.high)

    def limit(self, value: float) -> float:
        """Return the limit that a sick value is beyond."""
        return self.low if value < self.low else self.high

    def remedy(self, value: float) -> str:
        """Return what to do about a sick value."""
        return self.advice_low if value < self.low and self.advice_low else self.advice


def is_beyond(values: Array, low: float | Array, high: float | Array) -> Mask:
    """Return which values are beyond their limits; a missing one (NaN) is not."""
    return (values < low) | (values > high)


def _median(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else 1.0
