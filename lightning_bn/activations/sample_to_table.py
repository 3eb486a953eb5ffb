"""The layers' statistics over a run: a table, what is worst in it, and which layer was sick when."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from lightning_bn.activations.column import Statistic
from lightning_bn.activations.episodes import Episode, Episodes, verdict
from lightning_bn.activations.pool_to_host import Array, Mask, silent_numbers
from lightning_bn.activations.registry import COLUMNS, STATISTICS
from lightning_bn.activations.sample import ABSENT, KNOWN, WARM_UP, Sample, States, dicts, is_judged, warm_ups
from lightning_bn.number_blocks import NumberBlock

__all__ = ["Grid", "LayerTable", "scalars", "worst_layers"]

INDEX = ("layer", "stage", "step", "epoch")
_PLACE = "\0"  # where stage, step and epoch go in the lines of a sample


@dataclass(frozen=True)
class Grid:
    """One statistic of one stage, layer by layer and step by step."""

    statistic: Statistic
    layers: tuple[str, ...]
    steps: tuple[int, ...]
    values: Array  # (L, T); NaN where there is none
    states: States  # (L, T): `ABSENT`, `KNOWN` or `WARM_UP`

    def thinned(self, columns: int) -> Grid:
        """Return at most `columns` columns, each the worst of the samples it stands for, so that no short illness is
        lost."""
        if len(self.steps) <= columns:
            return self
        starts = np.linspace(0, len(self.steps), columns, endpoint=False).astype(int)
        # What is in warm-up is no illness, and NaN is the worst.
        distance = np.nan_to_num(self.statistic.distance(self.values), nan=np.inf) + (self.states == KNOWN)
        distance = np.where(self.states == ABSENT, -2.0, np.where(self.states == WARM_UP, -1.0, distance))
        parts = np.split(np.arange(len(self.steps)), starts[1:])
        rows = np.arange(len(self.layers))
        worst = [part[distance[:, part].argmax(axis=1)] for part in parts]
        values, states = (
            np.stack([each[rows, place] for place in worst], axis=1) for each in (self.values, self.states)
        )
        return replace(self, steps=tuple(self.steps[start] for start in starts), values=values, states=states)


@dataclass(frozen=True)
class _Taken:
    """A sample in the table."""

    stage: str
    step: int
    epoch: int
    layers: tuple[str, ...]
    values: Array
    states: States

    def rows(self) -> Iterable[dict[str, Any]]:
        for layer, states, row in zip(self.layers, self.states, dicts(self.values, self.states), strict=True):
            yield (
                {"layer": layer, "stage": self.stage, "step": self.step, "epoch": self.epoch}
                | row
                | {"warm_up": warm_ups(states)}
            )


class LayerTable:
    """One row for each layer at each sample; what grows with a run is this table alone, 9 bytes a number."""

    def __init__(self) -> None:
        self._samples: list[_Taken] = []
        self._counts: Counter[str] = Counter()
        self._order: list[str] = []
        self._episodes = Episodes()
        self._warm_up: int | None = None
        self._block = NumberBlock(6, missing="")

    def append(self, stage: str, step: int, epoch: int, sample: Sample) -> None:
        """Add one sample."""
        layers = sample.layers
        if self._samples and self._samples[-1].layers == layers:
            layers = self._samples[-1].layers  # one tuple for all samples
        else:
            self._order = _merged(self._order, layers)
        self._samples.append(_Taken(stage, step, epoch, layers, sample.values, sample.states))
        self._counts[stage] += 1
        self._episodes.take(stage, step, sample)
        if stage == "train" and (sample.states == WARM_UP).any():
            self._warm_up = step

    def rows(self, stage: str | None = None) -> list[dict[str, Any]]:
        """Return the rows in the order they were added: layer, stage, step and epoch, then `COLUMNS`, then the names of
        the statistics in warm-up; None where a statistic does not apply, NaN where it has no value."""
        return [row for taken in self._samples if stage in (None, taken.stage) for row in taken.rows()]

    def samples(self, stage: str) -> int:
        """Return the number of samples of a stage."""
        return self._counts[stage]

    def last_step(self, stage: str | None = None) -> int | None:
        """Return the step of the newest sample, of a stage or of all, None where there is none."""
        return next((taken.step for taken in reversed(self._samples) if stage in (None, taken.stage)), None)

    def grid(self, stage: str, name: str) -> Grid:
        """Return one statistic of one stage, without the layers that it applies to nowhere; layers in forward order."""
        samples = [taken for taken in self._samples if taken.stage == stage]
        places = {layer: place for place, layer in enumerate(self._order)}
        values = np.full((len(places), len(samples)), np.nan)
        states = np.zeros(values.shape, dtype=np.int8)
        column = COLUMNS.index(name)
        for index, taken in enumerate(samples):
            rows = [places[layer] for layer in taken.layers]
            values[rows, index], states[rows, index] = taken.values[:, column], taken.states[:, column]
        applies: Mask = np.any(is_judged(states), axis=1)
        kept = tuple(layer for layer, does in zip(self._order, applies, strict=True) if does)
        steps = tuple(taken.step for taken in samples)
        return Grid(STATISTICS[name], kept, steps, values[applies], states[applies])

    @property
    def episodes_begun(self) -> int:
        """How many episodes there have been."""
        return self._episodes.begun

    def episodes(self, stage: str | None = None) -> list[Episode]:
        """Return what was sick, the earliest and most upstream first."""
        order = {layer: place for place, layer in enumerate(self._order)}
        return [each for each in self._episodes.all(order) if stage in (None, each.stage)]

    def verdict(self) -> list[str]:
        """Return what to tell at the end of a run, as lines of text."""
        return verdict(self.episodes(), layers=len(self._order), samples=self._counts, warm_up=self._warm_up)

    def append_csv(self, path: Path) -> None:
        """Write the newest sample to the end of a CSV file, with six significant digits, and a head line where the file
        is new. A statistic that does not apply is empty, one without a value is ``nan``."""
        taken = self._samples[-1]
        new = not path.exists() or path.stat().st_size == 0
        has_value, warm = taken.states != ABSENT, (taken.states == WARM_UP).any(axis=1)
        notes = tuple(warm_ups(states) if is_warm else "" for states, is_warm in zip(taken.states, warm, strict=True))
        place = f",{taken.stage},{taken.step},{taken.epoch},"

        def lay_out(cells: list[list[str]]) -> str:
            rows = zip(taken.layers, cells, notes, strict=True)
            return "".join(f"{_cell(layer)}{_PLACE}{','.join(each)},{note}\r\n" for layer, each, note in rows)

        text = self._block.text(taken.values, has_value, (taken.layers, notes), lay_out).replace(_PLACE, place)
        with path.open("a", newline="") as file:
            if new:
                file.write(",".join((*INDEX, *COLUMNS, "warm_up")) + "\r\n")
            file.write(text)


def _cell(layer: str) -> str:
    """A name as a cell of a CSV file, in a format string."""
    text = StringIO()
    csv.writer(text, lineterminator="").writerow([layer])
    return text.getvalue().replace("%", "%%")


def _merged(order: Sequence[str], newest: Sequence[str]) -> list[str]:
    """The layers known so far and those of the newest sample, each new one straight behind the one before it."""
    found = list(order)
    known = set(order)
    before = -1
    for layer in newest:
        if layer not in known:
            found.insert(before + 1, layer)
            known.add(layer)
        before = found.index(layer) if layer in known else before
    return found


@silent_numbers()
def scalars(sample: Sample, wanted: Callable[[str], bool] | None = None) -> dict[str, float]:
    """Return the few numbers that stand for all layers of a sample, by name.

    ``<statistic>/worst`` is the value of the layer that is farthest from healthy, NaN where a layer has no finite
    value; ``<statistic>/median`` is the median over the layers that have one; of a scale, ``/smallest`` and
    ``/largest`` too, since it can be sick on either side. For the modules that are `wanted`, ``<statistic>/<layer>`` is
    their own.
    """
    found: dict[str, float] = {}
    own = [] if wanted is None else [row for row, module in enumerate(sample.modules) if wanted(module)]
    for name, statistic in STATISTICS.items():
        values, applies = sample.column(name)
        known = values[applies]
        if not len(known):
            continue
        finite = known[~np.isnan(known)]
        found[f"{name}/worst"] = _worst(statistic, known)
        found[f"{name}/median"] = float(np.median(finite)) if len(finite) else np.nan
        if statistic.low > 0:
            found[f"{name}/smallest"] = float(finite.min()) if len(finite) else np.nan
            found[f"{name}/largest"] = float(finite.max()) if len(finite) else np.nan
        found |= {f"{name}/{sample.layers[row]}": float(values[row]) for row in own if applies[row]}
    return found


def _worst(statistic: Statistic, values: Array) -> float:
    return float("nan") if np.isnan(values).any() else float(values[statistic.distance(values).argmax()])


@silent_numbers()
def worst_layers(sample: Sample) -> list[tuple[Statistic, str, float]]:
    """Return the worst layer of each statistic and its value."""
    found = []
    for name, statistic in STATISTICS.items():
        values, applies = sample.column(name)
        if applies.any():
            distance = np.where(applies, np.nan_to_num(statistic.distance(values), nan=np.inf), -1.0)
            row = int(distance.argmax())
            found.append((statistic, sample.layers[row], float(values[row])))
    return found
