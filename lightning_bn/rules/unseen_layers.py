"""Layers whose hooks say nothing: that they ran shows in their count of batches alone."""

from __future__ import annotations

from lightning_bn.rules.observer import Observer
from lightning_bn.rules.snapshots import StatisticsSnapshot


class UnseenLayers:
    """The layers of `observer` of which no forward was ever seen, as in compiled code."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._batches, self._reading = 0, StatisticsSnapshot(())
        self._before: dict[int, int] = {}

    @property
    def places(self) -> set[int]:
        """Their indices among the observed."""
        layers = enumerate(self._observer.layers)
        return {index for index, layer in layers if layer.tracks and index not in self._observer.seen}

    def begin(self, batches: int) -> None:
        """Count from here on; `batches` have been trained so far."""
        self._batches, self._reading = batches, StatisticsSnapshot(self._observer.layers)

    def begin_evaluation(self) -> None:
        """Read their counts before an evaluation; waits for the device."""
        self._before = StatisticsSnapshot(self._observer.layers).counts() if self.places else {}

    def counted_in_evaluation(self, reading: StatisticsSnapshot) -> list[int]:
        """Return those whose count rose since the evaluation began."""
        now = reading.counts() if self._before else {}
        return [index for index in self.places if now.get(index, 0) > self._before.get(index, 0)]

    def counted(self, reading: StatisticsSnapshot, batches: int) -> tuple[dict[int, int], int]:
        """Return by how much counts rose since this was last asked, where they did, and in how many training batches;
        waits for the device."""
        before, now = self._reading.counts(), reading.counts()
        risen = {index: rise for index in self.places if index in before and (rise := now[index] - before[index]) > 0}
        trained, self._batches, self._reading = batches - self._batches, batches, reading
        return risen, trained
