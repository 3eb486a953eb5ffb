"""What a statistic is: a column of the table, which values are sick, what to do about them, how it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lightning_bn.activations.pool_to_host import Array, Mask
from lightning_bn.grids import Limits

Source = Literal["activation", "gradient", "norm", "weight", "given"]
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


# Pale is healthy and dark is sick; where both sides are sick, pale lies in the middle.
FRACTION = Scale(0, 1, "OrRd", "share, 0 to 1")
# One is half way up from none, so that a single NaN is seen.
COUNT = Scale(-6, 6, "OrRd", "NaN and infinite values", log=True, count=True)
CHANNELS = Scale(-3, 3, "OrRd", "channels", log=True, count=True)

LOWER_RATE = "Lower the learning rate, warm it up, or clip gradients"


@dataclass(frozen=True)
class Column:
    """One column of the table: what it is measured of, how, and for which rows."""

    name: str
    of: Source
    value: Callable[[Any], Array]
    """Of `Channels`, `Norms` or, for what the model is given and for weights, an array: a value a row, NaN where there
    is none."""
    applies: Callable[[Any], Mask] | None = None
    """Likewise, which rows have the statistic; None: all."""


@dataclass(frozen=True, kw_only=True)
class Statistic(Column, Limits):
    """A column that is summed up over the layers: how it reads, which values are sick, what to do, how it is drawn."""

    label: str
    scale: Scale
    family: Family
    """What goes wrong, to tell which illnesses have one cause."""
    advice: str
    code: str = ""
    """Code that does so, where a line can."""
    code_low: str = ""
    """Code for where a layer is below its limit, if a line can."""
    rule: str = ""
    """The rule of `ModeCheck` whose page says more."""
    low: float = 0.0
    advice_low: str = ""
    """What to do where a layer is below its limit, if that differs."""
    judged: Callable[[Any], Mask] | None = None
    """Which rows the limits hold for; None: all that have the statistic."""
    rank: int = 5
    """Which of a layer's illnesses is told first, the smallest."""
    mapped: bool = True
    """Whether TensorBoard gets its heat map."""
    logged: bool = True
    """Whether loggers get its scalars; the table, the page and the verdict have it anyhow."""
    chart: str | None = None
    """The title of its chart in the Custom Scalars tab, if it has one."""
    band: bool = False
    """Whether that chart shows the median within the smallest and the largest, and not the worst and the median."""

    def limit(self, value: float) -> float:
        """Return the limit that a sick value is beyond."""
        return self.low if value < self.low else self.high

    def remedy(self, value: float) -> str:
        """Return what to do about a sick value."""
        return self.advice_low if value < self.low and self.advice_low else self.advice
