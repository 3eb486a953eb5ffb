"""One metric of several candidates over the epochs, and which candidate did best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

from lightning_bn.tables import text_table


class Scores:
    """The values that a metric took for each of several candidates, one value per evaluation.

    Args:
        metric: its name.
        mode: "min" where small is good, "max" where large is.

    Example:
        >>> scores = Scores("val_loss", "min")
        >>> scores.add({"ema 0.1": 0.5, "window 5": 0.4})
        >>> scores.add({"ema 0.1": 0.1, "window 5": 0.1})
        >>> scores.best
        'window 5'
        >>> print(scores)
        val_loss    mean   worst    last
        window 5  0.2500  0.4000  0.1000  <- best mean
        ema 0.1   0.3000  0.5000  0.1000
    """

    def __init__(self, metric: str, mode: str) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r}: 'min' where a small {metric} is good, 'max' where a large one is.")
        self.metric = metric
        self.mode = mode
        self.values: dict[str, list[float]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Append one evaluation of the candidates."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(float(value))

    def better(self, one: float, other: float) -> bool:
        """Whether `one` is better than `other`; NaN is worse than everything."""
        return self._cost(one) < self._cost(other)

    def mean(self, name: str) -> float:
        """Return the mean over the evaluations."""
        return fmean(self.values[name])

    def worst(self, name: str) -> float:
        """Return the worst of the evaluations."""
        return max(self.values[name], key=self._cost)

    @property
    def best(self) -> str | None:
        """The candidate with the best mean, the first of equals; None before the first evaluation."""
        return min(self.values, key=lambda name: self._cost(self.mean(name)), default=None)

    def __str__(self) -> str:
        names = sorted(self.values, key=lambda name: self._cost(self.mean(name)))
        rows = [
            [name, *(f"{v:.4f}" for v in (self.mean(name), self.worst(name), self.values[name][-1]))] for name in names
        ]
        lines = text_table([self.metric, "mean", "worst", "last"], rows)
        if len(lines) > 1:
            lines[1] += "  <- best mean"
        return "\n".join(lines)

    def _cost(self, value: float) -> float:
        if math.isnan(value):
            return math.inf
        return value if self.mode == "min" else -value
