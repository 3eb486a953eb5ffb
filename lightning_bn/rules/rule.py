"""What a rule is, what it is shown, and what comes of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from lightning_bn.discovery import BatchNormLayer
from lightning_bn.rules.arguments import Setting
from lightning_bn.rules.batch_pattern import ForwardRecord
from lightning_bn.rules.finding import Fix, Level
from lightning_bn.rules.observer import Modes, Observer

if TYPE_CHECKING:
    from lightning_bn.rules.fit_test import Misfit
    from lightning_bn.rules.learning import Learning
    from lightning_bn.rules.snapshots import Values


@dataclass(frozen=True)
class Seen:
    """One observation of a rule: one cause, for all the layers that share it."""

    layers: Sequence[str]
    event: str | Callable[[Sequence[str]], str]
    """What was seen; a function of the layers where the words name one of them, since those that were told before are
    left out."""
    level: Level | None = None
    """None: the rule's own."""
    fix: Fix | None = None
    """None: the rule's own."""
    why: str | None = None
    """None: the rule's own."""
    title: str | None = None
    """None: the rule's own."""
    mend: Callable[[], None] | None = None
    worst_first: bool = False
    """Whether the first of the layers is the one to name, rather than a module that holds several."""


@dataclass
class Configuration:
    """A model at rest."""

    observer: Observer
    setting: Setting

    @property
    def model(self) -> nn.Module:
        """The model as a whole."""
        return self.observer.modules[0]


@dataclass
class BatchRecord(Configuration):
    """What one batch did; in `stage` "train" it may hold several forwards and backwards."""

    stage: str
    step: int
    index: int
    before: Modes
    """Modes when the batch began."""
    opened: Modes
    """Modes at its first forward."""
    after: Modes
    early: bool = False
    """Whether it is what ran in an evaluation before its first batch."""
    explained: Collection[str] = ()
    """Modules whose mode a finding has told of already."""
    forwards: list[ForwardRecord] = field(default_factory=list)
    learning: Learning | None = None
    averaged: Collection[str] = ()
    """Names of the layers that no optimizer holds and whose weights are written all the same: copies, such as an
    averaged teacher."""
    undecided: Collection[str] = ()
    """Names of the layers that no optimizer holds and that may turn out to be such copies before the epoch ends."""
    largest: int = 0
    """Samples in the largest training batch so far."""
    uses: Mapping[str, int] = field(default_factory=dict)
    """Names of layers that the first batch ran more than once, and how often its loss depended on each."""

    @property
    def training(self) -> bool:
        return self.stage == "train"

    @property
    def when(self) -> str:
        return f"in batch {self.index}" if self.index >= 0 else "outside of a batch"

    def by_layer(self) -> dict[BatchNormLayer, list[ForwardRecord]]:
        grouped = defaultdict(list)
        for forward in self.forwards:
            grouped[self.observer.layers[forward.layer]].append(forward)
        return grouped

    def by_layer_and_set(self) -> Iterator[tuple[BatchNormLayer, list[ForwardRecord]]]:
        """Yield each layer's forwards, those with another set of statistics by themselves: nothing of one set moves
        another."""
        for layer, forwards in self.by_layer().items():
            for other_set in dict.fromkeys(forward.other_set for forward in forwards):
                yield layer, [forward for forward in forwards if forward.other_set == other_set]


@dataclass
class Evaluation(Configuration):
    """What an evaluation left behind."""

    stage: str
    evaluated: Collection[int] = ()
    """Indices of the layers that ran in eval mode."""
    steady: Collection[int] = ()
    """Indices of the layers that ran in eval mode while training too."""
    values: Values | None = None
    """The statistics after it; None before training began."""
    counted: Collection[int] = ()
    """Indices of the layers no forward of which could be seen, and whose count of batches rose."""
    trained: bool = True
    """Whether a training batch ran before."""
    fitting: bool = False
    """Whether training may go on after it."""
    moving: Collection[int] = ()
    """Indices of the layers whose statistics training batches moved."""
    held: Collection[int] = ()
    """Indices of the layers that did not learn in training."""
    fit: Misfit | None = None
    """Whether statistics fit what it got; None where that was not judged."""
    copies: Collection[int] = ()
    """Indices of the layers whose weights were written since training began and whose statistics were not."""
    vanishing: dict[str, list[int]] = field(default_factory=dict)
    """Channels whose running variance is next to nothing, and whose input varied in the evaluation."""
    other_sets: Mapping[str, Values] = field(default_factory=dict)
    """The statistics after it of sets that were used in it, of the layers that ran with them."""


@dataclass
class Return(Configuration):
    """The way back from an evaluation to training."""

    before: Modes
    after: Modes
    interrupted: bool
    """Whether the evaluation ended in an exception."""


class Rule:
    """A mistake, and how it is recognised.

    A subclass overrides the methods for the moments at which it can see something; each returns one `Seen` for each
    cause. A rule with evidence of its own is in one file with it, and is shown it by `Inspection`.
    """

    code: ClassVar[str]
    title: ClassVar[str]
    level: ClassVar[Level] = "warning"
    why: ClassVar[str]
    fix: ClassVar[Fix] = Fix("", "advice")
    mendable: ClassVar[bool] = False
    """Whether it can be fixed at once, safely: by putting modules into the mode they were meant to be in."""

    def configuration(self, at: Configuration) -> Iterable[Seen]:
        """Look at a model at rest, before a run or in `check`."""
        return ()

    def at_rest(self, at: Configuration) -> Iterable[Seen]:
        """Look at a model at rest in `check` alone: for what a run shows with more certainty."""
        return ()

    def batch(self, batch: BatchRecord) -> Iterable[Seen]:
        """Look at a batch of any stage."""
        return ()

    def evaluation(self, evaluation: Evaluation) -> Iterable[Seen]:
        """Look at the end of a validation, test or prediction."""
        return ()

    def ended(self, evaluation: Evaluation) -> Iterable[Seen]:
        """Look, at the end of training, at the layers that the last evaluation ran."""
        return ()

    def returned(self, back: Return) -> Iterable[Seen]:
        """Look at the modes when training goes on after an evaluation."""
        return ()

    def values(self, values: Values, last: str, root: str, in_set: str | None) -> Iterable[Seen]:
        """Look at the running statistics; `last` says when they were looked at before, `root` how the model is called,
        `in_set` which set they are of, None for the one in place."""
        return ()

    def counts(self, batch: BatchRecord, moved: dict[int, int], batches: int) -> Iterable[Seen]:
        """Look at how often the layers that can't be seen `moved` in `batches` training batches."""
        return ()

    def fit(self, misfit: Misfit, evaluation: Evaluation, told: Collection[str]) -> Iterable[Seen]:
        """Look at statistics that do not fit what an evaluation gets; `told`: layers for which a rule has named the
        cause."""
        return ()
