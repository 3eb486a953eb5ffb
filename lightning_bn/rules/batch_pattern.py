"""What was seen of each forward of a layer, and what training batches have in common: it tells when the layers need no
hooks."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

PATIENCE = 2
"""How many batches must be like the one before until the layers' hooks are removed; doubled whenever a batch broke the
pattern."""

MOST_PATIENCE = 1024


class ForwardRecord(NamedTuple):
    """One forward of one batch-norm layer. Nothing in it was read from a device.

    Records are equal for two batches that did the same, so that the comparison of two lists of them tells whether there
    is anything to judge.

    Example:
        >>> ForwardRecord(0, True, True, True, True, False, False, 1, 0, False, (2, 3, 5, 5)).values
        50
    """

    layer: int
    """Index into `Observer.layers`."""
    training: bool
    moved: bool
    """Whether it wrote the running statistics: whether it counted its batch, by the version of ``num_batches_tracked``,
    which lives on the host; in a layer with a forward of its own, whether the statistics themselves were written."""
    tracking: bool
    """The layer's ``track_running_stats`` at that time."""
    grad: bool
    recomputed: bool
    """Whether it ran inside a backward pass: the recomputation of activation checkpointing."""
    failed: bool
    call: int
    """Which outermost call of the model it was part of, counted since `Observer.begin`; negative where the layer was
    called by itself."""
    source: int
    """Which input that call had: calls that were given the same tensor have the same number."""
    reweighted: bool
    """Whether the layer's affine weight was written since its first forward of this batch."""
    shape: tuple[int, ...]
    """Of the layer's input."""
    other_set: str | None = None
    """The set of statistics that was in use, if it was not the one that the layer has between batches."""
    part_of: Hashable = None
    """Of what the layer's input was a part, as where a ghost batch norm cuts a batch up; None: it was no part."""

    @property
    def samples(self) -> int:
        """Samples in the batch."""
        return self.shape[0] if self.shape else 0

    @property
    def values(self) -> int:
        """Values per channel."""
        return math.prod(self.shape[:1] + self.shape[2:]) if self.shape else 0


@dataclass
class BatchOutline:
    """One batch: in full, or as far as it shows from outside."""

    calls: list[Hashable] = field(default_factory=list)
    """For each call of the model what was known when it began: which part, samples, modes of its layers, grad mode,
    ..."""
    rises: list[int] = field(default_factory=list)
    """By how much the version of each layer's ``num_batches_tracked`` rose in the batch."""
    forwards: list[ForwardRecord] = field(default_factory=list)
    entered_backward: set[int] = field(default_factory=set)


class BatchPattern:
    """The last batch that was seen in full, and whether batches have been like it for long enough.

    A hook on a layer costs a host-bound step more by being there (torch takes the long way through ``Module.__call__``)
    than by what it does. So the layers have no hooks while batches are alike. A call of the model that begins unlike
    the one at its place in the last full batch sets them again before its layers run; a batch in which other statistics
    moved sets them for the next.
    """

    def __init__(self) -> None:
        self.usual = BatchOutline()
        self._alike = 0
        self._patience = PATIENCE

    def seen(self, batch: BatchOutline) -> bool:
        """Take in a batch seen in full; returns whether the layers need no hooks."""
        self._alike = self._alike + 1 if batch == self.usual else 0
        self.usual = batch
        # Forwards outside of the calls that are watched (a negative call) can't be foreseen.
        return self._alike >= self._patience and bool(batch.forwards) and all(f.call > 0 for f in batch.forwards)

    def broken(self) -> None:
        """Note that a batch was unlike the usual one."""
        self._alike = 0
        self._patience = min(2 * self._patience, MOST_PATIENCE)

    def forget(self) -> None:
        """Begin anew, in an epoch or after an evaluation."""
        self._alike = 0
        self.usual = BatchOutline()

    def follows(self, calls: list[Hashable]) -> bool:
        """Whether the latest of `calls` is what it was in the usual batch."""
        place = len(calls) - 1
        return place < len(self.usual.calls) and calls[place] == self.usual.calls[place]

    def before(self, call: int) -> list[ForwardRecord]:
        """Return the forwards of the usual batch up to its call number `call`."""
        return [f for f in self.usual.forwards if f.call < call]

    def with_surplus(self, rises: list[int]) -> list[ForwardRecord]:
        """Return the forwards of the usual batch, plus one for each rise of a layer's version beyond the usual."""
        usual, last = self.usual.forwards, {f.layer: f for f in self.usual.forwards}
        call = 1 + max((f.call for f in usual), default=0)
        source = 1 + max((f.source for f in usual), default=0)
        surplus = []
        for index, (rise, expected) in enumerate(zip(rises, self.usual.rises, strict=False)):
            shape = last[index].shape if index in last else ()
            record = ForwardRecord(index, True, True, True, True, False, False, -call, source, False, shape)
            surplus += [record] * max(rise - expected, 0)
        return usual + surplus
