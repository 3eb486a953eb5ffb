"""Batches in step with the other ranks, where a forward is something that all of them do together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lightning_bn.ranks.collective import Ranks

__all__ = ["in_step"]

_NONE = object()


def in_step(batches: Iterator[Any], ranks: Ranks, enough: Callable[[], bool]) -> Iterator[tuple[Any, bool]]:
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
