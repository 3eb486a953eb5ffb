"""Which layers ran how, over the batches of a run and of its last evaluation; of those whose hooks say nothing, by
their count of batches alone."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_bn.rules.observer import Observer
from lightning_bn.rules.snapshots import StatisticsSnapshot, Values


class LayersThatRan:
    """What stays known of forwards, by the indices of the layers of an `Observer`.

    Attributes:
        trained: those that ran in a training batch.
        moving: those whose statistics a training batch moved.
        steady: those that ran in eval mode in a training batch, with gradients.
        evaluated: those that ran in eval mode otherwise, since `begin_evaluation`.
        largest: the number of samples of the largest training batch.
    """

    def __init__(self) -> None:
        self.trained: set[int] = set()
        self.moving: set[int] = set()
        self.steady: set[int] = set()
        self.evaluated: set[int] = set()
        self.largest = 0
        self._elsewhere: dict[str, set[int]] = {}  # by set of statistics that is not in place at rest, what ran with it

    def begin_evaluation(self) -> None:
        """Forget the last one."""
        self.evaluated, self._elsewhere = set(), {}

    def follow(self, places: Mapping[int, int]) -> None:
        """The layers have other indices: by the old one the new one, of those that are still there."""
        self.trained, self.moving, self.steady, self.evaluated = (
            {places[index] for index in known if index in places}
            for known in (self.trained, self.moving, self.steady, self.evaluated)
        )

    def remember(self, observer: Observer, *, training: bool) -> None:
        """Take note of the forwards of a batch."""
        for forward in observer.forwards:
            if training:
                self.trained.add(forward.layer)
                self.largest = max(self.largest, forward.samples)
                if forward.moved:
                    self.moving.add(forward.layer)
            if not forward.training and forward.other_set is not None:
                self._elsewhere.setdefault(forward.other_set, set()).add(forward.layer)
            elif not forward.training:
                (self.steady if forward.grad and training else self.evaluated).add(forward.layer)

    def values_of_other_sets(self, observer: Observer) -> dict[str, Values]:
        """Return the statistics of the sets that ran in the evaluation and are not in place at rest; waits for the
        device."""
        found = {}
        for name, ran in self._elsewhere.items():
            with observer.sets.using(name):
                values = StatisticsSnapshot(observer.layers).values()
            found[name] = {index: each for index, each in values.items() if index in ran}
        return found

    @property
    def only_evaluated(self) -> set[int]:
        """Those that no training batch has run."""
        return self.evaluated - self.moving - self.steady


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

    def counted(self, batches: int) -> tuple[dict[int, int], int]:
        """Return by how much counts rose since this was last asked, where they did, and in how many training batches;
        waits for the device."""
        reading = StatisticsSnapshot(self._observer.layers)
        before, now = self._reading.counts(), reading.counts()
        risen = {index: rise for index in self.places if index in before and (rise := now[index] - before[index]) > 0}
        trained, self._batches, self._reading = batches - self._batches, batches, reading
        return risen, trained
