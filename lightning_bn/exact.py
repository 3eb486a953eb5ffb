"""The pass in which every layer normalises all batches with the statistics that it is going to have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.collection import Estimate, Seen, Tallies, merged_summary, progress_bar
from lightning_bn.collective import share
from lightning_bn.lockstep import Lockstep, Stop
from lightning_bn.measuring import measured
from lightning_bn.tally import Row

__all__ = ["collect_exactly"]


def collect_exactly(
    batches: Iterable[Any],
    run: Callable[[Any], object],
    layers: Sequence[_BatchNorm],
    estimate: Estimate,
    *,
    num_batches: int | None,
    progress: bool,
) -> Seen:
    """Run all batches in lockstep, over all ranks; at each layer they go on normalised with its new statistics.

    At a layer that is called again the statistics are those of all calls so far: only its last call is normalised with the final ones.
    """
    tallies = Tallies(layers, pending=None)
    new: dict[int, tuple[Tensor, Tensor]] = {}

    def station(place: int, row: Row) -> tuple[Tensor, Tensor]:
        tallies.add(lockstep.current(), place, row)
        lockstep.stop(place)
        return new[place]

    def arrived(place: int) -> None:
        summary = merged_summary(tallies.summary(place))
        if summary is not None:
            new[place] = estimate(place, summary)
        bar.set_postfix_str(f"layer {len(new)} of {len(layers)}")

    def jobs() -> Iterator[Callable[[], object]]:
        for batch in islice(batches, num_batches):
            yield partial(run, batch)
            tallies.batches += 1
            bar.update()

    with measured(layers, station), progress_bar(batches, num_batches, layers, progress) as bar:
        lockstep = Lockstep(_first_of_all_ranks, arrived)
        lockstep.run(jobs())
    return tallies.seen(num_batches)


def _first_of_all_ranks(stop: Stop | None) -> Stop | None:
    return min((theirs for theirs in share(stop) if theirs is not None), default=None)
