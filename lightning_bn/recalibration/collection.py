"""One pass over the data: what every layer sees, in the order in which the batches come or in lockstep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import reduce
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from lightning_bn.buffers import running_mean
from lightning_bn.ranks.collective import Ranks
from lightning_bn.recalibration.tally import BatchMoments, Summary, Tally

Estimate = Callable[[int, Summary], tuple[Tensor, Tensor]]
"""The statistics that the layer of that place gets for what it saw: mean and variance, (C,)."""

# Batches whose rows are summed up together.
_PENDING = 32
# With fewer batches their spread says too little about the standard error to stop by it.
_MIN_BATCHES = 8
# Stands for a batch where there is none.
_NONE = object()


class PassResult(NamedTuple):
    """The outcome of a pass: of one rank, or merged over all."""

    summary: Summary
    """Of all layers side by side, on the CPU; of no batches where a layer did not run."""
    batches: int
    samples: int
    skipped: int
    spilled: int
    """Bytes of activations that were in a file at most."""
    stopped_by: str


class Tallies:
    """What every layer of a list has seen so far: one tally for the layers of each device."""

    def __init__(self, layers: Sequence[_BatchNorm], *, pending: int | None) -> None:
        places: dict[torch.device, list[int]] = {}
        for place, layer in enumerate(layers):
            places.setdefault(running_mean(layer).device, []).append(place)
        self._layers = layers
        self._parts = [
            (own, Tally([layers[place].num_features for place in own], device, pending))
            for device, own in places.items()
        ]
        self._home = {place: (tally, number) for own, tally in self._parts for number, place in enumerate(own)}
        self._samples: dict[int, int] = {}
        self.batches = 0

    def add(self, batch: int, place: int, row: BatchMoments) -> None:
        """Take in what the layer at `place` got in the batch of that number."""
        self._samples.setdefault(batch, row.samples)
        tally, number = self._home[place]
        tally.add(batch, number, row)

    def summary(self, place: int) -> Summary | None:
        """Return what the layer at `place` has seen, None for nothing; only where no batch was summed up before
        (``pending=None``)."""
        tally, number = self._home[place]
        return tally.summary_of(number)

    def standard_error(self) -> float:
        """Return the standard error of the mean of the worst layer, in units of the standard deviation; NaN while it
        can't be told."""
        errors = [
            summary.standard_error(self._layers[place].eps).cpu()
            for places, tally in self._parts
            for place, summary in zip(places, tally.summary().split(tally.sizes), strict=True)
            if summary.batches[0]
        ]
        return torch.stack(errors).max().item() if errors else float("nan")

    def seen(self, num_batches: int | None, *, tolerance_met: bool = False, spilled: int = 0) -> PassResult:
        """Return the outcome of a pass that was to read at most `num_batches`."""
        summaries: dict[int, Summary] = {}
        skipped: set[int] = set()
        for places, tally in self._parts:
            summary, left_out = tally.close()
            summaries |= zip(places, summary.split(tally.sizes), strict=True)
            skipped |= left_out
        ended = "num_batches" if self.batches == num_batches else "end"
        return PassResult(
            Summary.side_by_side(map(summaries.__getitem__, range(len(summaries)))),
            self.batches,
            sum(self._samples.values()),
            len(skipped),
            spilled,
            "tolerance" if tolerance_met else ended,
        )


class OnePass:
    """A pass in which each layer normalises a batch with the batch's own mean and biased variance, as in training.

    Args:
        layers: which are looked at.
        ranks: whose batches are taken together.
        in_step: whether a forward is something that the ranks do together, so that all must run as many.
        num_batches: see `recalibrate`, as of what follows.
        tolerance: likewise.
        progress: likewise.
    """

    def __init__(
        self,
        layers: Sequence[_BatchNorm],
        ranks: Ranks,
        *,
        in_step: bool,
        num_batches: int | None,
        tolerance: float | None,
        progress: bool,
    ) -> None:
        self._layers = layers
        self._ranks = ranks
        self._in_step = in_step
        self._counts = True  # whether the batch that is run is one of this rank's own
        self._met = False
        self._num_batches = num_batches
        self._tolerance = tolerance
        self._progress = progress
        self._tallies = Tallies(layers, pending=_PENDING)

    def on_input(self, place: int, row: BatchMoments) -> tuple[Tensor, Tensor]:
        """What a layer does with its input; see `measured`, inside which `collect` is to be called."""
        if self._counts:
            self._tallies.add(self._tallies.batches, place, row)
        return row.mean, row.var

    def collect(self, batches: Iterable[Any], run: Callable[[Any], object]) -> PassResult:
        """Run every batch, until the tolerance is met."""
        with progress_bar(batches, self._num_batches, self._layers, self._progress and self._ranks.is_first) as bar:
            for batch, counts in self._taken(islice(batches, self._num_batches)):
                self._counts = counts
                run(batch)
                if counts:
                    self._tallies.batches += 1
                    bar.update()
                    self._met = self._tolerance is not None and self._meets(self._tolerance, bar)
        return self._tallies.seen(self._num_batches, tolerance_met=self._met)

    def _taken(self, batches: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        if self._in_step:
            yield from _in_step(batches, self._ranks, lambda: self._met)
            return
        for batch in batches:
            yield batch, True
            if self._met:
                return

    def _meets(self, tolerance: float, bar: tqdm[Any]) -> bool:
        if self._tallies.batches < _MIN_BATCHES and bar.disable:
            return False
        error = self._tallies.standard_error()
        bar.set_postfix_str(f"std error {error:.3g}, goal {tolerance:g}")
        return self._tallies.batches >= _MIN_BATCHES and error < tolerance


def _in_step(batches: Iterator[Any], ranks: Ranks, enough: Callable[[], bool]) -> Iterator[tuple[Any, bool]]:
    """Yield as many batches as the rank that takes the most: this rank's own, each with True, and then its last one
    again, with False.

    A forward of a sharded model fetches parameters from all ranks, so that one that has no batch left must run along;
    what its layers see then does not count. A rank that has no batch at all runs along with one of another rank's.

    Args:
        batches: of this rank.
        ranks: which run the model together.
        enough: tells, before each batch, whether this rank needs no more.

    Raises:
        RankError: another rank's batches failed.
    """
    last = _NONE
    while True:
        with ranks.told():
            batch = _NONE if enough() else next(batches, _NONE)
        who = ranks.share(batch is not _NONE)
        if not any(who):
            return
        if last is _NONE and not all(who):  # only in the first step, so on all ranks or on none
            other = ranks.broadcast(batch if ranks.rank == who.index(True) else None, who.index(True))
            last = other if batch is _NONE else batch
        if batch is not _NONE:
            last = batch
        yield last, batch is not _NONE


def progress_bar(
    batches: Iterable[Any], num_batches: int | None, layers: Sequence[_BatchNorm], progress: bool
) -> tqdm[Any]:
    """Return the bar, or where `progress` is False a silent one."""
    try:
        length = len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a loader over an iterable dataset has a __len__ that raises
        length = None
    known = [number for number in (length, num_batches) if number is not None]
    return tqdm(
        total=min(known, default=None),
        desc=f"Recalibrating {len(layers)} layers",
        # Without the speed and the per cent, 80 columns hold the standard error too.
        bar_format="{desc}: |{bar}| {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}]",
        unit="batch",
        leave=False,
        disable=not progress,
    )


def merged(seen: PassResult, ranks: Ranks) -> PassResult:
    """Return what all ranks have seen; every rank must call it."""
    everyone = ranks.share(seen)
    return PassResult(
        reduce(Summary.merge, (each.summary for each in everyone)),
        batches=sum(each.batches for each in everyone),
        samples=sum(each.samples for each in everyone),
        skipped=sum(each.skipped for each in everyone),
        spilled=sum(each.spilled for each in everyone),
        stopped_by=seen.stopped_by,
    )


def merged_summary(summary: Summary | None, ranks: Ranks) -> Summary | None:
    """Return what all ranks have seen at one layer; every rank must call it."""
    if not ranks.are_several:
        return summary
    everyone = ranks.share(None if summary is None else summary.to(torch.device("cpu")))
    found = [each for each in everyone if each is not None]
    return reduce(Summary.merge, found) if found else None
