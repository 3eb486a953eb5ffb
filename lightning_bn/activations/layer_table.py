"""The layers' statistics over a run: a table, what is worst in it, and which layer is sick since when."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_bn.activations.registry import COLUMNS, STATISTICS, Array, Statistic

__all__ = ["Ailment", "Grid", "LayerTable", "scalars", "worst_layers"]


@dataclass(frozen=True)
class Grid:
    """One statistic of one stage, layer by layer and step by step."""

    statistic: Statistic
    layers: tuple[str, ...]
    steps: tuple[int, ...]
    values: Array  # (L, T); NaN where there is none

    def thinned(self, columns: int) -> Grid:
        """Return at most `columns` columns, each the worst of the samples it stands for, so that no short illness is
        lost."""
        if len(self.steps) <= columns:
            return self
        starts = np.linspace(0, len(self.steps), columns, endpoint=False).astype(int)
        distance = np.nan_to_num(self.statistic.distance(self.values), nan=-1.0)
        parts = np.split(np.arange(len(self.steps)), starts[1:])
        rows = np.arange(len(self.layers))
        worst = [self.values[rows, part[distance[:, part].argmax(axis=1)]] for part in parts]
        return replace(self, steps=tuple(self.steps[start] for start in starts), values=np.stack(worst, axis=1))


@dataclass(frozen=True)
class Ailment:
    """A layer whose statistic is beyond its limits, and since when it has been so at every sample."""

    layer: str
    statistic: Statistic
    since: int
    value: float


class LayerTable:
    """One row for each layer at each sample; what grows with a run is this table alone, 8 bytes a number."""

    def __init__(self) -> None:
        self._samples: list[tuple[str, int, int, tuple[str, ...], Array]] = []
        self._counts: Counter[str] = Counter()
        self._ailments: dict[str, dict[tuple[str, str], Ailment]] = {}

    def append(self, stage: str, step: int, epoch: int, rows: Mapping[str, Mapping[str, float | None]]) -> None:
        """Add one sample: by layer, the values of `COLUMNS`."""
        values = np.array([[row[name] for name in COLUMNS] for row in rows.values()], dtype=np.float64).reshape(
            len(rows), len(COLUMNS)
        )
        layers = tuple(rows)
        if self._samples and self._samples[-1][3] == layers:
            layers = self._samples[-1][3]  # one tuple for all samples
        self._samples.append((stage, step, epoch, layers, values))
        self._counts[stage] += 1
        before = self._ailments.get(stage, {})
        now = self._ailments[stage] = {}
        for name, statistic in STATISTICS.items():
            column = values[:, COLUMNS.index(name)]
            for place in np.flatnonzero(statistic.is_sick(column)):
                key = (layers[place], name)
                since = before[key].since if key in before else step
                now[key] = Ailment(layers[place], statistic, since, float(column[place]))

    def rows(self, stage: str | None = None) -> list[dict[str, Any]]:
        """Return the rows in the order they were added: layer, stage, step and epoch, then `COLUMNS`; None where one
        does not apply."""
        return [
            {"layer": layer, "stage": of_stage, "step": step, "epoch": epoch}
            | dict(zip(COLUMNS, map(_or_none, numbers), strict=True))
            for of_stage, step, epoch, layers, values in self._samples
            if stage in (None, of_stage)
            for layer, numbers in zip(layers, values.tolist(), strict=True)
        ]

    def samples(self, stage: str) -> int:
        """Return the number of samples of a stage."""
        return self._counts[stage]

    def last_step(self, stage: str | None = None) -> int | None:
        """Return the step of the newest sample, of a stage or of all, None where there is none."""
        return next((step for of_stage, step, *_ in reversed(self._samples) if stage in (None, of_stage)), None)

    def grid(self, stage: str, name: str) -> Grid:
        """Return one statistic of one stage, without the layers that it applies to nowhere; layers in forward order."""
        samples = [sample for sample in self._samples if sample[0] == stage]
        # The newest sample has the layers in forward order; ones that it lacks come behind.
        layers = dict.fromkeys(layer for sample in reversed(samples) for layer in sample[3])
        places = {layer: place for place, layer in enumerate(layers)}
        values = np.full((len(layers), len(samples)), np.nan)
        column = COLUMNS.index(name)
        for index, sample in enumerate(samples):
            values[[places[layer] for layer in sample[3]], index] = sample[4][:, column]
        applies = ~np.isnan(values).all(axis=1) if samples else np.zeros(0, dtype=bool)
        kept = tuple(layer for layer, does in zip(layers, applies, strict=True) if does)
        return Grid(STATISTICS[name], kept, tuple(sample[1] for sample in samples), values[applies])

    def ailments(self, stage: str) -> list[Ailment]:
        """Return what is sick at the newest sample of a stage, the newest illness first."""
        return sorted(self._ailments.get(stage, {}).values(), key=lambda ailment: -ailment.since)

    def append_csv(self, path: Path) -> None:
        """Write the newest sample to the end of a CSV file, with six significant digits, and a head line where the file
        is new."""
        stage, step, epoch, layers, values = self._samples[-1]
        new = not path.exists() or path.stat().st_size == 0
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(("layer", "stage", "step", "epoch", *COLUMNS))
            for layer, numbers in zip(layers, values.tolist(), strict=True):
                writer.writerow(
                    (layer, stage, step, epoch, *("" if number != number else f"{number:.6g}" for number in numbers))
                )


def scalars(
    rows: Mapping[str, Mapping[str, float | None]], wanted: Callable[[str], bool] = lambda layer: False
) -> dict[str, float]:
    """Return the few numbers that stand for all layers of a sample, by name.

    ``<statistic>/worst`` is the value of the layer that is farthest from healthy, ``<statistic>/median`` the median
    over the layers that have the statistic; of a scale, ``/smallest`` and ``/largest`` too, since it can be sick on
    either side. For the layers that are `wanted`, ``<statistic>/<layer>`` is their own.
    """
    found: dict[str, float] = {}
    for name, statistic in STATISTICS.items():
        known = {layer: value for layer, row in rows.items() if (value := row[name]) is not None}
        if not known:
            continue
        values = np.array(list(known.values()))
        found[f"{name}/worst"] = _worst(statistic, values)
        found[f"{name}/median"] = float(np.median(values))
        if statistic.log:
            found |= {f"{name}/smallest": float(values.min()), f"{name}/largest": float(values.max())}
        found |= {f"{name}/{layer}": value for layer, value in known.items() if wanted(layer)}
    return found


def _worst(statistic: Statistic, values: Array) -> float:
    return float(values[statistic.distance(values).argmax()])


def _or_none(number: float) -> float | None:
    return None if number != number else number


def worst_layers(rows: Mapping[str, Mapping[str, float | None]]) -> Sequence[tuple[Statistic, str, float]]:
    """Return the worst layer of each statistic and its value."""
    found = []
    for name, statistic in STATISTICS.items():
        known = {layer: value for layer, row in rows.items() if (value := row[name]) is not None}
        if known:
            worst = _worst(statistic, np.array(list(known.values())))
            found.append((statistic, next(layer for layer, value in known.items() if value == worst), worst))
    return found
