"""The layers' statistics over a run: a table, what is worst in it, and which layer was sick when."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_bn.activations.column import Statistic
from lightning_bn.activations.episodes import Episode, Episodes, in_order, verdict
from lightning_bn.activations.pool_to_host import Array, Mask, silent_numbers
from lightning_bn.activations.registry import COLUMNS, STATISTICS
from lightning_bn.activations.sample import ABSENT, WARM_UP, Sample, States, dicts, is_judged, warm_ups
from lightning_bn.grids import Grid, distances

_PLACES = [COLUMNS.index(name) for name in STATISTICS]
_LOG = np.array([each.log for each in STATISTICS.values()])

INDEX = ("layer", "stage", "step", "epoch")


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
        table = zip(self.layers, dicts(self.values, self.states), warm_ups(self.states), strict=True)
        for layer, row, warm in table:
            yield dict(zip(INDEX, (layer, self.stage, self.step, self.epoch), strict=True)) | row | {"warm_up": warm}

    def csv(self) -> str:
        """Return the rows as lines of a CSV file."""
        has_value = self.states != ABSENT
        forms = map(_form, self.layers, map(bytes, has_value), warm_ups(self.states))
        rows = "".join(forms) % tuple(self.values[has_value].tolist())
        return rows % ((f"{self.stage},{self.step},{self.epoch}",) * len(self.layers))


@lru_cache(maxsize=2**12)
def _form(layer: str, has_value: bytes, warm: str) -> str:
    """A format string for a row, of which comes one for what is the same in each row: one call for all numbers of a
    sample is many times as fast as one for each."""
    text = StringIO()
    cells = ["%.6g" if has else "" for has in has_value]
    csv.writer(text).writerow((layer.replace("%", "%%%%"), "%%s", *cells, warm))
    return text.getvalue()


class LayerTable:
    """One row for each layer at each sample; what grows with a run is this table alone, 9 bytes a number."""

    def __init__(self) -> None:
        self._samples: list[_Taken] = []
        self._counts: Counter[str] = Counter()
        self._set_order([])
        self._episodes = Episodes()
        self._warm_up: int | None = None
        self._judged: set[str] = set()  # layers for which there are limits

    def append(self, stage: str, step: int, epoch: int, sample: Sample) -> list[Episode]:
        """Add one sample, and return the episodes that begin in it, the most upstream first."""
        layers = sample.layers
        if self._samples and self._samples[-1].layers == layers:
            layers = self._samples[-1].layers  # one tuple for all samples
        else:
            self._set_order(_merged(self._order, layers))
        self._samples.append(_Taken(stage, step, epoch, layers, sample.values, sample.states))
        self._counts[stage] += 1
        self._judged.update(compress(layers, sample.is_limited()))
        if stage == "train" and (sample.states == WARM_UP).any():
            self._warm_up = step
        return in_order(self._episodes.take(stage, step, sample), self.places())

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
        values = np.full((len(self._order), len(samples)), np.nan)
        states = np.zeros(values.shape, dtype=np.int8)
        column = COLUMNS.index(name)
        for index, taken in enumerate(samples):
            rows = [self._places[layer] for layer in taken.layers]
            values[rows, index], states[rows, index] = taken.values[:, column], taken.states[:, column]
        applies: Mask = np.any(is_judged(states), axis=1)
        kept = tuple(layer for layer, does in zip(self._order, applies, strict=True) if does)
        values, states = values[applies], states[applies]
        steps = np.array([taken.step for taken in samples], dtype=np.int64)
        nans = np.isnan(values) & (states != ABSENT)
        return Grid(kept, steps, steps, values, nans, states == WARM_UP, len(samples))

    @property
    def changes(self) -> tuple[int, int]:
        """How many episodes there have been, and how many of them have recovered: where that changes the verdict does,
        but for how long they last."""
        return self._episodes.begun, self._episodes.recovered

    def episodes(self, stage: str | None = None) -> list[Episode]:
        """Return what was sick, the earliest and most upstream first."""
        return [each for each in self._episodes.all(self.places()) if stage in (None, each.stage)]

    def places(self) -> dict[str, int]:
        """Return the number of each layer, in forward order over all stages, from 0; not to be changed."""
        return self._places

    def _set_order(self, layers: list[str]) -> None:
        self._order, self._places = layers, {layer: place for place, layer in enumerate(layers)}

    def verdict(self) -> list[str]:
        """Return what to tell at the end of a run, as lines of text."""
        return verdict(self.episodes(), layers=len(self._judged), samples=self._counts, warm_up=self._warm_up)

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on in another process needs for its verdict, as plain numbers and strings; the
        rows stay behind."""
        return {
            "layers": list(self._order),
            "judged": sorted(self._judged),
            "samples": dict(self._counts),
            "warm_up": self._warm_up,
            "step": self.last_step(),
            "episodes": self._episodes.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, without rows."""
        self._samples = []
        self._set_order(list(state["layers"]))
        self._counts, self._warm_up = Counter(state["samples"]), state["warm_up"]
        self._episodes.load_state_dict(state["episodes"])
        self._judged = set(state.get("judged", self._order))  # which older checkpoints lack

    def append_csv(self, path: Path, newest: int = 1) -> None:
        """Write the newest samples to the end of a CSV file, with six significant digits, and a head line where the
        file is new. A statistic that does not apply is empty, one without a value is ``nan``."""
        with path.open("a", newline="") as file:
            if file.tell() == 0:
                csv.writer(file).writerow((*INDEX, *COLUMNS, "warm_up"))
            file.write("".join([each.csv() for each in self._samples[-newest:]]))


def cut_csv(path: Path, step: int) -> None:
    """Take out of a CSV file what a run that was killed wrote behind the checkpoint from which this one goes on: it is
    written again.

    Args:
        path: of the file; it need not exist.
        step: at which this run begins, whose training sample is its own, and whose evaluation the earlier run's. 0: an
            earlier run's file goes.
    """
    if step == 0 or not path.exists():
        path.unlink(missing_ok=True)
        return
    with path.open(newline="") as file:
        head, *rows = [*csv.reader(file)] or [[]]
    # A kill may have cut the last row short.
    whole = [row for row in rows if len(row) == len(head) and row[2].isdigit()]
    kept = [row for row in whole if int(row[2]) < step or (int(row[2]) == step and row[1] != "train")]
    if len(kept) < len(rows):
        part = path.with_suffix(".part")
        with part.open("w", newline="") as file:
            csv.writer(file).writerows([head, *kept])
        part.replace(path)


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
def scalars(
    sample: Sample, wanted: Callable[[str], bool] | None = None, places: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Return the few numbers that stand for all layers of a sample, by name.

    ``<statistic>/worst`` is the value of the layer that is farthest from healthy, NaN where a layer has no finite
    value, and ``<statistic>/worst_layer`` the number of that layer in `places`; ``<statistic>/median`` is the median
    over the layers that have one; of a scale, ``/smallest`` and ``/largest`` too, since it can be sick on either side.
    For the modules that are `wanted`, ``<statistic>/<layer>`` is their own.
    """
    found: dict[str, float] = {}
    if not sample.layers:
        return found
    own = [] if wanted is None else [row for row, module in enumerate(sample.modules) if wanted(module)]
    values, applies = sample.values[:, _PLACES], is_judged(sample.states[:, _PLACES])
    worst = _worst_rows(values, applies)
    known = np.sort(np.where(applies, values, np.nan), axis=0)  # NaN last
    counts = (~np.isnan(known)).sum(axis=0)
    for place, (name, statistic) in enumerate(STATISTICS.items()):
        if not statistic.logged or not applies[:, place].any():
            continue
        column, count, row = known[:, place], int(counts[place]), int(worst[place])
        found[f"{name}/worst"] = float(values[row, place])
        if places is not None:
            found[f"{name}/worst_layer"] = float(places[sample.layers[row]])
        found[f"{name}/median"] = float(column[(count - 1) // 2] + column[count // 2]) / 2 if count else np.nan
        if statistic.low > 0:
            found[f"{name}/smallest"] = float(column[0])
            found[f"{name}/largest"] = float(column[max(count - 1, 0)])
        found |= {f"{name}/{sample.layers[row]}": float(values[row, place]) for row in own if applies[row, place]}
    return found


@silent_numbers()
def worst_layers(sample: Sample) -> list[tuple[Statistic, str, float]]:
    """Return the worst layer of each statistic and its value."""
    if not sample.layers:
        return []
    values, applies = sample.values[:, _PLACES], is_judged(sample.states[:, _PLACES])
    rows = enumerate(zip(STATISTICS.values(), _worst_rows(values, applies).tolist(), strict=True))
    return [
        (statistic, sample.layers[row], float(values[row, place]))
        for place, (statistic, row) in rows
        if applies[row, place]
    ]


def _worst_rows(values: Array, applies: Mask) -> NDArray[np.int64]:
    """By statistic, the row farthest from healthy of those that it applies to; before all others one without a
    value."""
    usual = np.array([each.usual(values[applies[:, place], place]) for place, each in enumerate(STATISTICS.values())])
    distance = np.nan_to_num(distances(values, usual, _LOG), nan=np.inf, posinf=np.inf)
    rows: NDArray[np.int64] = np.where(applies, distance, -1.0).argmax(axis=0)
    return rows
