"""The statistics of a layer: one entry each, from which the table, the limits, the colours, the scalars and the charts
are made.

A new statistic is an entry here, and its value in a row of `activations.collector`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["COLUMNS", "DRIFT_STATISTICS", "STATISTICS", "Array", "Scale", "Statistic"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """How values become colours. The range is fixed, so that two runs, and two moments of one, can be compared by eye."""

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
class Statistic:
    """What is known about one statistic that is summed up over the layers: how it reads, which values are sick, how it
    is drawn."""

    name: str
    label: str
    scale: Scale
    low: float = 0.0
    """Below it a layer is sick."""
    high: float = np.inf
    """Above it a layer is sick."""
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
        healthy = (float(np.median(values)) or 1.0) if self.healthy is None else self.healthy
        with np.errstate(divide="ignore"):
            return np.abs(np.log(values / healthy)) if self.log else np.abs(values - healthy)

    def is_sick(self, values: Array) -> NDArray[np.bool_]:
        """Return which values are beyond the limits; a missing one (NaN) is not."""
        return (values < self.low) | (values > self.high)


# Pale is healthy and dark is sick; where both sides are sick, pale lies in the middle.
_FRACTION = Scale(0, 1, "OrRd", "share, 0 to 1")
# A ReLU's inputs are half below zero: up to there all is well.
_ZEROS = Scale(0.5, 1, "OrRd", "share; up to a half is healthy")
# One is half way up from none, so that a single NaN is seen.
_COUNT = Scale(-6, 6, "OrRd", "NaN and infinite values", log=True, count=True)
_GRADIENT = Scale(-9, 0, "viridis", "standard deviation", log=True)

_ENTRIES: tuple[Statistic | str, ...] = (
    "mean",
    Statistic(
        "std",
        "standard deviation of the activations",
        Scale(-3, 3, "RdBu_r", "standard deviation; 1 is healthy", log=True),
        low=1e-3,
        high=1e3,
        healthy=1.0,
        log=True,
        chart="scale: standard deviation of the activations (median, smallest to largest layer)",
        band=True,
    ),
    Statistic(
        "abs_max",
        "greatest absolute activation",
        Scale(0, 5, "OrRd", "greatest absolute value", log=True),
        high=1e4,
        mapped=False,
    ),
    Statistic(
        "zero_fraction",
        "share of activations that are zero",
        _ZEROS,
        high=0.95,
        chart="zeros, share (worst layer, median)",
    ),
    Statistic(
        "dead_fraction",
        "share of channels that are dead",
        _FRACTION,
        high=0.25,
        chart="dead channels, share (worst layer, median)",
    ),
    Statistic("saturated_fraction", "share of activations that are saturated", _FRACTION, high=0.5),
    Statistic(
        "nonfinite",
        "number of NaN and infinite activations",
        _COUNT,
        high=0,
        chart="NaN and infinite activations (worst layer, median)",
    ),
    Statistic(
        "drift_mean",
        "shift of the mean, in running standard deviations (rms over channels)",
        Scale(0, 2, "OrRd", "running standard deviations"),
        high=1.0,
        chart="drift of the mean, in running standard deviations (worst layer, median)",
    ),
    "drift_mean_max",
    Statistic(
        "drift_var",
        "log ratio of batch to running variance (rms over channels)",
        Scale(0, 2, "OrRd", "|log(batch / running variance)|"),
        high=1.0,
        chart="drift of the variance, log ratio (worst layer, median)",
    ),
    "drift_var_max",
    "weight_min",
    "weight_max",
    "bias_min",
    "bias_max",
    Statistic("weight_near_zero", "share of affine weights near zero", _FRACTION, high=0.5, mapped=False),
    # No scale of a gradient is healthy in itself: it goes with the loss. What vanishes or explodes is far from the
    # other layers.
    Statistic(
        "grad_std",
        "standard deviation of the gradient at the output",
        _GRADIENT,
        low=1e-12,
        high=1e3,
        healthy=None,
        log=True,
    ),
    Statistic("grad_nonfinite", "number of NaN and infinite gradients", _COUNT, high=0),
)

COLUMNS: tuple[str, ...] = tuple(entry if isinstance(entry, str) else entry.name for entry in _ENTRIES)
"""All columns of the table, in their order."""
STATISTICS: dict[str, Statistic] = {entry.name: entry for entry in _ENTRIES if isinstance(entry, Statistic)}
"""By column, those that are summed up over the layers."""
DRIFT_STATISTICS: tuple[str, ...] = tuple(name for name in COLUMNS if name.startswith("drift"))
"""What `activations.drift` measures of a batch norm, in the order of its columns."""
