"""What a rule is, what it is shown, and what comes of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from lightning_bn.discovery import BatchNormLayer, Modes, NamedModules, ancestors
from lightning_bn.rules.arguments import Setting
from lightning_bn.rules.batch_pattern import ForwardRecord
from lightning_bn.rules.finding import Fix, Level
from lightning_bn.rules.fixes import call, expression, modules_of

if TYPE_CHECKING:
    from lightning_bn.rules.layers_that_ran import LayersThatRan
    from lightning_bn.rules.learning import Learning
    from lightning_bn.rules.replay import Misfit
    from lightning_bn.rules.snapshots import Values


@dataclass(frozen=True)
class Seen:
    """One observation of a rule: one cause, for all the layers that share it."""

    layers: Sequence[str]
    event: str | Callable[[Sequence[str]], str]
    """What was seen; a function of the layers where the words name one of them, since those that were told before are
    left out."""
    # None: the rule's own.
    level: Level | None = None
    fix: Fix | None = None
    why: str | None = None
    title: str | None = None
    mend: Callable[[], None] | None = None
    worst_first: bool = False
    """Whether the first of the layers is the one to name, rather than a module that holds several."""


@dataclass
class Occasion:
    """A model and a run, when they are looked at; writes the code of fixes, in which the user calls the model
    `Setting.root`."""

    observer: NamedModules
    setting: Setting
    stage: str = "check"
    step: int = 0
    index: int = -1
    """Of the batch; negative: outside of one."""
    held: Collection[int] = ()
    """Indices of the layers that do not learn."""

    @property
    def model(self) -> nn.Module:
        """The model as a whole."""
        return self.observer.modules[0]

    @property
    def layers(self) -> Sequence[BatchNormLayer]:
        """All that are observed."""
        return self.observer.layers

    @property
    def when(self) -> str:
        return f"in batch {self.index}" if self.index >= 0 else "outside of a batch"

    def named(self, indices: Iterable[int]) -> list[str]:
        """Return the names of layers."""
        return [self.layers[index].name for index in indices]

    def tops(self, names: Collection[str]) -> list[str]:
        """Return the topmost modules that hold no other batch norms than those of `names`."""
        return modules_of(names, [layer.name for layer in self.layers])

    def around(self, layers: Collection[str]) -> str:
        """Return the code of the one module that holds `layers` and no others, of the model where there are several."""
        tops = self.tops(layers)
        return self.path(tops[0] if len(tops) == 1 else "")

    def path(self, name: str) -> str:
        """Return the code of a module."""
        return expression(self.setting.root, name, self.model)

    def call(self, modules: Sequence[str], method: str) -> str:
        """Return the code that calls a method of each of `modules`."""
        return call(self.setting.root, modules, method, self.model)

    def mode_calls(self, tops: Sequence[str], wanted: Modes) -> str:
        """Return code that gives the modules `tops`, and all below them, the modes `wanted`, in as few calls as
        ``train`` and ``eval`` need.

        ``self.model.train()`` alone would wake a frozen part: it is followed by ``self.model.backbone.eval()``.
        """
        given: dict[str, bool] = {}
        calls: dict[str, bool] = {}
        for name, mode in zip(self.observer.names, wanted, strict=True):  # each module after those that hold it
            above = next((given[parent] for parent in ancestors(name) if parent in given), None)
            if name in tops or above is not None:
                given[name] = mode
                if above != mode:
                    calls[name] = mode
        if len(set(calls.values())) == 1:
            return self.call(list(calls), "train" if True in calls.values() else "eval")
        return "; ".join(f"{self.path(name)}.{'train' if mode else 'eval'}()" for name, mode in calls.items())

    def recalibration(self, layers: Sequence[BatchNormLayer]) -> str:
        """Return a call of `recalibrate` that reaches `layers`.

        It leaves frozen layers out unless they are named, and refuses a model that has no others.
        """
        chosen = ""
        if any(layer.frozen for layer in layers):
            names, every = [layer.name for layer in layers], {layer.name for layer in self.layers}
            tops = [top if top in every else f"{top}.*" for top in self.tops(names)]
            chosen = f", layers={'all' if set(names) == every else tops!r}"
        return f"recalibrate({self.setting.root}, batches{chosen})"


@dataclass(kw_only=True)
class BatchRecord(Occasion):
    """What one batch did; in `stage` "train" it may hold several forwards and backwards."""

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
    entered_backward: Collection[int] = ()
    """The calls that repeat an input at other weights and that gradients flowed through."""

    def by_layer(self) -> dict[BatchNormLayer, list[ForwardRecord]]:
        grouped = defaultdict(list)
        for forward in self.forwards:
            grouped[self.layers[forward.layer]].append(forward)
        return grouped

    def by_layer_and_set(self) -> Iterator[tuple[BatchNormLayer, list[ForwardRecord]]]:
        """Yield each layer's forwards, those with another set of statistics by themselves: nothing of one set moves
        another."""
        for layer, forwards in self.by_layer().items():
            for other_set in dict.fromkeys(forward.other_set for forward in forwards):
                yield layer, [forward for forward in forwards if forward.other_set == other_set]


@dataclass(kw_only=True)
class Evaluation(Occasion):
    """What an evaluation left behind."""

    ran: LayersThatRan
    values: Values | None = None
    """The statistics after it; None before training began."""
    counted: Collection[int] = ()
    """Indices of the layers no forward of which could be seen, and whose count of batches rose."""
    trained: bool = True
    """Whether a training batch ran before."""
    fitting: bool = False
    """Whether training may go on after it."""
    fit: Misfit | None = None
    """Whether statistics fit what it got; None where that was not judged."""
    copies: Collection[int] = ()
    """Indices of the layers whose weights were written since training began and whose statistics were not."""
    vanishing: dict[str, list[int]] = field(default_factory=dict)
    """Channels whose running variance is next to nothing, and whose input varied in the evaluation."""
    other_sets: Mapping[str, Values] = field(default_factory=dict)
    """The statistics after it of sets that were used in it, of the layers that ran with them."""


OCCASIONS = {
    "configuration": "(at) a model at rest, before a run or in `check`",
    "at_rest": "(at) a model at rest in `check` alone: for what a run shows with more certainty",
    "values": "(at, values, last, in_set) statistics that are not sound; `last`: when they were looked at before; "
    "`in_set`: the set that they are of, None for the one in place",
    "begin": "(at) a run begins, or its model has other layers now",
    "begin_epoch": "(at) a training epoch begins",
    "begin_batch": "(at) a training batch begins",
    "graph": "(at, adjacency) the first training batch has ended, and `Adjacency` has seen it",
    "batch": "(batch) a training batch has ended that was unlike the last ones",
    "other_batch": "(batch) likewise a batch of an evaluation, or what ran between two of them",
    "end_batch": "(at) a training batch or an evaluation has ended, or training begins",
    "counts": "(batch, moved, batches) how often layers that can't be seen `moved` in `batches` training batches",
    "copies": "(at, layers) by the end of an epoch copies are known, that training runs in eval mode and writes the "
    "weights of",
    "examine": "(at) from time to time, when the device may be waited for",
    "end_epoch": "(at) a training epoch has ended; the device may be waited for",
    "end_training": "(at) nothing follows the last batch",
    "exported": "(at, before, when) an exporter has run the model and left it in other modes than those `before`",
    "begin_evaluation": "(at) a validation, test or prediction begins",
    "evaluation": "(evaluation) a validation, test or prediction has ended",
    "fit": "(evaluation, misfit, told) whether statistics fit what it got; `told`: layers for which a rule has named "
    "the cause",
    "ended": "(evaluation) a fit has ended: the layers that its last evaluation ran",
    "returned": "(at, before, interrupted) training goes on after an evaluation, `before` which the modes were these",
}
"""The methods that a rule may have: their arguments, and when they are called."""


class Rule:
    """A mistake, and how it is recognised.

    A subclass has a method for each of the `OCCASIONS` on which it can see something, and yields one `Seen` for each
    cause. Each `Inspection` has rules of its own, so a rule keeps evidence that it alone needs in itself.
    """

    code: ClassVar[str]
    title: ClassVar[str]
    level: ClassVar[Level] = "warning"
    why: ClassVar[str]
    fix: ClassVar[Fix] = Fix("", "advice")
    mendable: ClassVar[bool] = False
    """Whether it can be fixed at once, safely: by putting modules into the mode they were meant to be in."""

    def __init_subclass__(cls) -> None:
        unknown = [
            name for name in vars(cls) if callable(getattr(cls, name)) and name[0] != "_" and name not in OCCASIONS
        ]
        if unknown:
            raise TypeError(f"{cls.__name__}.{unknown[0]} would never be called: a rule has {', '.join(OCCASIONS)}.")
