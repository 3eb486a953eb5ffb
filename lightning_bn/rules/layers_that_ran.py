"""Which layers ran how, over the batches of a run and of its last evaluation."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_bn.rules.observer import Observer
from lightning_bn.rules.snapshots import StatisticsSnapshot, Values


class LayersThatRan:
    """What stays known of forwards, by the indices of the layers of an `Observer`.

    Attributes:
        moving: those whose statistics a training batch moved.
        steady: those that ran in eval mode in a training batch, with gradients.
        evaluated: those that ran in eval mode otherwise, since `begin_evaluation`.
        largest: the number of samples of the largest training batch.
    """

    def __init__(self) -> None:
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
        self.moving, self.steady, self.evaluated = (
            {places[index] for index in known if index in places}
            for known in (self.moving, self.steady, self.evaluated)
        )

    def remember(self, observer: Observer, *, training: bool) -> None:
        """Take note of the forwards of a batch."""
        for forward in observer.forwards:
            if training:
                observer.trained.add(forward.layer)
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
