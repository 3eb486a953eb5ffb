"""One pass over the data: what every layer sees, in the order in which the batches come or in lockstep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from functools import reduce
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from lightning_bn.ranks.collective import in_group, is_first_rank, share
from lightning_bn.recalibration.tally import Row, Summary, Tally

__all__ = ["Estimate", "OnePass", "Seen", "Tallies", "merged", "merged_summary", "progress_bar"]

Estimate = Callable[[int, Summary], tuple[Tensor, Tensor]]
"""The statistics that the layer of that place gets for what it saw: mean and variance, (C,)."""

# Batches whose rows are summed up together.
_PENDING = 32
# With fewer batches their spread says too little about the standard error to stop by it.
_MIN_BATCHES = 8


class Seen(NamedTuple):
    """The outcome of a pass: of one rank, or merged over all."""

    summaries: list[Summary | None]
    """By layer; on the CPU; None for a layer that did not run."""
    batches: int
    samples: int
    skipped: int
    stopped_by: str


class Tallies:
    """What every layer of a list has seen so far."""

    def __init__(self, layers: Sequence[_BatchNorm], *, pending: int | None) -> None:
        self._tallies = [Tally(pending) for _ in layers]
        self._eps = [layer.eps for layer in layers]
        self._samples: dict[int, int] = {}
        self.batches = 0

    def add(self, batch: int, place: int, row: Row) -> None:
        """Take in what the layer at `place` got in the batch of that number."""
        self._samples.setdefault(batch, row.samples)
        self._tallies[place].add(batch, row)

    def summary(self, place: int) -> Summary | None:
        """Return what the layer at `place` has seen, None for nothing."""
        return self._tallies[place].summary()

    def standard_error(self) -> float:
        """Return the standard error of the mean of the worst layer, in units of the standard deviation; NaN while it can't be told."""
        summaries = [(tally.summary(), eps) for tally, eps in zip(self._tallies, self._eps, strict=True)]
        errors = [summary.standard_error(eps) for summary, eps in summaries if summary is not None]
        return torch.stack([error.to(errors[0].device) for error in errors]).max().item() if errors else float("nan")

    def seen(self, num_batches: int | None, *, tolerance_met: bool = False) -> Seen:
        """Return the outcome, on the CPU."""
        closed = [tally.close() for tally in self._tallies]
        ended = "num_batches" if self.batches == num_batches else "end"
        return Seen(
            summaries=[summary for summary, _ in closed],
            batches=self.batches,
            samples=sum(self._samples.values()),
            skipped=len(set().union(*(skipped for _, skipped in closed))),
            stopped_by="tolerance" if tolerance_met else ended,
        )


class OnePass:
    """A pass in which each layer normalises a batch with the batch's own mean and biased variance, as in training."""

    def __init__(self, layers: Sequence[_BatchNorm], *, num_batches: int | None, tolerance: float | None, progress: bool) -> None:
        self._layers = layers
        self._num_batches = num_batches
        self._tolerance = tolerance
        self._progress = progress
        self._tallies = Tallies(layers, pending=_PENDING)

    def station(self, place: int, row: Row) -> tuple[Tensor, Tensor]:
        """What a layer does with its input; see `measured`, inside which `collect` is to be called."""
        self._tallies.add(self._tallies.batches, place, row)
        return row.mean, row.var

    def collect(self, batches: Iterable[Any], run: Callable[[Any], object]) -> Seen:
        """Run every batch, until the tolerance is met."""
        met = False
        with progress_bar(batches, self._num_batches, self._layers, self._progress) as bar:
            for batch in islice(batches, self._num_batches):
                run(batch)
                self._tallies.batches += 1
                bar.update()
                met = self._tolerance is not None and self._meets(self._tolerance, bar)
                if met:
                    break
        return self._tallies.seen(self._num_batches, tolerance_met=met)

    def _meets(self, tolerance: float, bar: tqdm[Any]) -> bool:
        if self._tallies.batches < _MIN_BATCHES and bar.disable:
            return False
        error = self._tallies.standard_error()
        bar.set_postfix_str(f"std error {error:.3g}, to reach {tolerance:g}")
        return self._tallies.batches >= _MIN_BATCHES and error < tolerance


def progress_bar(batches: Iterable[Any], num_batches: int | None, layers: Sequence[_BatchNorm], progress: bool) -> tqdm[Any]:
    """Return the bar, on the first rank; a silent one otherwise."""
    try:
        length = len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a loader over an iterable dataset has a __len__ that raises
        length = None
    known = [number for number in (length, num_batches) if number is not None]
    description = f"Recalibrating {len(layers)} batch-norm layers"
    return tqdm(total=min(known, default=None), desc=description, unit="batch", leave=False, disable=not (progress and is_first_rank()))


def merged(seen: Seen) -> Seen:
    """Return what all ranks have seen; every rank must call it."""
    everyone = share(seen)
    total = everyone[0]
    for other in everyone[1:]:
        pairs = zip(total.summaries, other.summaries, strict=True)
        total = total._replace(
            summaries=[_merge(one, another) for one, another in pairs],
            batches=total.batches + other.batches,
            samples=total.samples + other.samples,
            skipped=total.skipped + other.skipped,
        )
    return total._replace(stopped_by=seen.stopped_by)


def merged_summary(summary: Summary | None) -> Summary | None:
    """Return what all ranks have seen at one layer; every rank must call it."""
    if not in_group():
        return summary
    return reduce(_merge, share(None if summary is None else summary.to(torch.device("cpu"))))


def _merge(one: Summary | None, other: Summary | None) -> Summary | None:
    return one.merge(other) if one is not None and other is not None else one or other
