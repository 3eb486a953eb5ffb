"""What training batches have in common, seen without a hook on any layer: it tells when the layers' hooks can rest."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from lightning_bn.rules.forwards import Trace

__all__ = ["Routine", "Sketch"]

PATIENCE = 2
"""How many batches must be like the one before until the layers' hooks rest; doubled whenever a batch broke the
routine."""

MOST_PATIENCE = 1024


@dataclass
class Sketch:
    """One batch: in full, or as far as it shows from outside."""

    calls: list[Hashable] = field(default_factory=list)
    """For each call of the model what was known when it began: which part, samples, modes of its layers, grad mode,
    ..."""
    rises: list[int] = field(default_factory=list)
    """By how much the version of each layer's ``num_batches_tracked`` rose in the batch."""
    trace: list[Trace] = field(default_factory=list)
    """What the layers' hooks saw."""
    entered_backward: set[int] = field(default_factory=set)


class Routine:
    """The last batch that was seen in full, and whether batches have been like it for long enough.

    A hook on a layer costs a host-bound step more by being there (torch takes the long way through ``Module.__call__``)
    than by what it does. So the hooks on the layers rest while batches are alike. A call of the model that begins
    unlike the one at its place in the last full batch wakes them before its layers run; a batch in which other
    statistics moved wakes them for the next.
    """

    def __init__(self) -> None:
        self.usual = Sketch()
        self._alike = 0
        self._patience = PATIENCE

    def seen(self, batch: Sketch) -> bool:
        """Take in a batch seen in full; returns whether the hooks can rest."""
        self._alike = self._alike + 1 if batch == self.usual else 0
        self.usual = batch
        # Forwards outside of the calls that are watched (a negative call) can't be foreseen.
        return self._alike >= self._patience and bool(batch.trace) and all(trace[7] > 0 for trace in batch.trace)

    def broken(self) -> None:
        """Note that a batch was unlike the usual one."""
        self._alike = 0
        self._patience = min(2 * self._patience, MOST_PATIENCE)

    def forget(self) -> None:
        """Begin anew, in an epoch or after an evaluation."""
        self._alike = 0
        self.usual = Sketch()

    def follows(self, calls: list[Hashable]) -> bool:
        """Whether the latest of `calls` is what it was in the usual batch."""
        place = len(calls) - 1
        return place < len(self.usual.calls) and calls[place] == self.usual.calls[place]

    def before(self, call: int) -> list[Trace]:
        """Return the forwards of the usual batch up to its call number `call`."""
        return [trace for trace in self.usual.trace if trace[7] < call]

    def with_surplus(self, rises: list[int]) -> list[Trace]:
        """Return the forwards of the usual batch, plus one for each rise of a layer's version beyond the usual."""
        usual, last = self.usual.trace, {trace[0]: trace for trace in self.usual.trace}
        call = 1 + max((trace[7] for trace in usual), default=0)
        source = 1 + max((trace[8] for trace in usual), default=0)
        surplus = []
        for index, (rise, expected) in enumerate(zip(rises, self.usual.rises, strict=False)):
            shape = last[index][10] if index in last else ()
            surplus += [(index, True, True, True, True, False, False, -call, source, False, shape)] * max(
                rise - expected, 0
            )
        return usual + surplus
