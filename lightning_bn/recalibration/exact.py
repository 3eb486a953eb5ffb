"""The pass in which every layer normalises all batches with the statistics that it is going to have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.buffers import running_mean
from lightning_bn.ranks.collective import Ranks
from lightning_bn.recalibration.collection import Estimate, PassResult, Tallies, merged_summary, progress_bar
from lightning_bn.recalibration.lockstep import Lockstep, Stop
from lightning_bn.recalibration.spilling import Spilling, free_memory
from lightning_bn.recalibration.tally import BatchMoments


class ExactPass:
    """A pass in which all batches, of all ranks, go through the network in lockstep, normalised at each layer with its
    new statistics.

    At a layer that is called again they are those of all calls so far: only its last call is normalised with the final
    ones.
    """

    def __init__(
        self,
        layers: Sequence[_BatchNorm],
        ranks: Ranks,
        estimate: Estimate,
        *,
        num_batches: int | None,
        progress: bool,
        budget: float | None,
        model: nn.Module,
    ) -> None:
        self._layers = layers
        self._ranks = ranks
        self._estimate = estimate
        self._num_batches = num_batches
        self._progress = progress
        self._tallies = Tallies(layers, pending=None)
        self._new: dict[int, tuple[Tensor, Tensor]] = {}
        if budget is None and (free := free_memory(running_mean(layers[0]).device)) is not None:
            budget = free / 2
        self._spilling = Spilling(budget, model)
        self._lockstep = Lockstep(self._first_of_all_ranks, self._arrived, self._spilling)

    def on_input(self, place: int, row: BatchMoments) -> tuple[Tensor, Tensor]:
        """What a layer does with its input; see `measured`, inside which `collect` is to be called."""
        self._spilling.paused = True  # the tallies are read at any time
        self._tallies.add(self._lockstep.current(), place, row)
        self._spilling.paused = False
        self._lockstep.stop(place)
        return self._new[place]

    def _arrived(self, place: int) -> None:
        summary = merged_summary(self._tallies.summary(place), self._ranks)
        if summary is not None:
            self._new[place] = self._estimate(place, summary)
        self._bar.set_postfix_str(f"layer {len(self._new)} of {len(self._layers)}")

    def collect(self, batches: Iterable[Any], run: Callable[[Any], object]) -> PassResult:
        """Run all batches."""
        with progress_bar(
            batches, self._num_batches, self._layers, self._progress and self._ranks.is_first
        ) as self._bar:
            self._lockstep.run(self._jobs(batches, run))
        return self._tallies.seen(self._num_batches, spilled=self._spilling.bytes)

    def _jobs(self, batches: Iterable[Any], run: Callable[[Any], object]) -> Iterator[Callable[[], object]]:
        for batch in islice(batches, self._num_batches):
            yield partial(run, batch)
            self._tallies.batches += 1
            self._bar.update()

    def _first_of_all_ranks(self, stop: Stop | None) -> Stop | None:
        return min((theirs for theirs in self._ranks.share(stop) if theirs is not None), default=None)
