"""What a rule is, what it is shown, and what comes of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal

from lightning_bn.discovery import BatchNormLayer
from lightning_bn.rules.observer import Forward, Modes, Observer, ancestors

if TYPE_CHECKING:
    from lightning_bn.rules.adjacency import DeadBias, DropoutShift
    from lightning_bn.rules.readings import Gap, Values

__all__ = ["Batch", "Evaluation", "Finding", "Level", "ModeCheckError", "Return", "Rule", "Seen", "Setting"]

Level = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """A mistake that was seen.

    ``str(finding)`` is its message, of at most six lines: what happened, where and when; why it matters; the mend; how to silence it.
    """

    __module__ = "lightning_bn"

    code: str
    level: Level
    """error: certain and harmful. warning: observed, and may be meant. info: harmless, or no more than likely."""
    layers: tuple[str, ...]
    """Names of all layers or modules it is about."""
    stage: str
    """train, sanity_check, validate, test, predict; "check" where nothing ran."""
    step: int
    """Optimizer steps taken by then."""
    message: str
    mended: bool = False
    """Whether it was mended on the spot, as `fix` asked."""

    def __str__(self) -> str:
        return self.message


class ModeCheckError(RuntimeError):
    """Raised in place of a warning; `findings` are those that raised it."""

    __module__ = "lightning_bn"

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = list(findings)
        super().__init__("\n".join(str(finding) for finding in findings))


@dataclass(frozen=True)
class Seen:
    """One observation of a rule: one cause, for all the layers that share it."""

    layers: Sequence[str]
    event: str
    level: Level | None = None
    """None: the rule's own."""
    fix: str | None = None
    """None: the rule's own."""
    mend: Callable[[], None] | None = None


@dataclass(frozen=True)
class Setting:
    """What is known of a run beside the model."""

    root: str = "model"
    """How the user's code calls the model."""
    caller: str = "check"
    """What the user called, and may give ``ignore`` and ``allow_eval``."""
    allow_eval: tuple[str, ...] = ()
    ranks: int = 1
    accumulated: int = 1
    """Batches a gradient is accumulated over."""
    manual: bool = False
    """Whether the user's code steps the optimizers, and so may call parts of the model in turn."""

    def allows_eval(self, name: str) -> bool:
        """Whether the module, or one above it, is kept in eval mode on purpose."""
        return any(fnmatchcase(each, pattern) for pattern in self.allow_eval for each in (name, *ancestors(name)))


@dataclass
class Batch:
    """What one batch did; in `stage` "train" it may hold several forwards and backwards."""

    observer: Observer
    setting: Setting
    stage: str
    step: int
    index: int
    before: Modes
    """Modes when the batch began."""
    opened: Modes
    """Modes at its first forward."""
    after: Modes
    explained: Collection[str] = ()
    """Modules whose mode a finding has told of already."""
    forwards: list[Forward] = field(default_factory=list)

    @property
    def training(self) -> bool:
        return self.stage == "train"

    @property
    def when(self) -> str:
        return f"in batch {self.index}" if self.index >= 0 else "outside of a batch"

    def by_layer(self) -> dict[BatchNormLayer, list[Forward]]:
        grouped = defaultdict(list)
        for forward in self.forwards:
            grouped[self.observer.layers[forward.layer]].append(forward)
        return grouped


@dataclass
class Evaluation:
    """What an evaluation left behind."""

    observer: Observer
    setting: Setting
    stage: str
    evaluated: Collection[int] = ()
    """Indices of the layers that ran in eval mode."""
    steady: Collection[int] = ()
    """Indices of the layers that ran in eval mode while training too."""
    values: Values | None = None
    """The statistics after it; None before training began."""
    counted: Collection[int] = ()
    """Indices of the layers no forward of which could be seen, and whose count of batches rose."""


@dataclass
class Return:
    """The way back from an evaluation to training."""

    observer: Observer
    setting: Setting
    before: Modes
    after: Modes
    interrupted: bool
    """Whether the evaluation ended in an exception."""


@dataclass
class Configuration:
    """A model at rest."""

    observer: Observer
    setting: Setting


class Rule:
    """A mistake, and how it is recognised.

    A subclass overrides the methods for the moments at which it can see something; each returns one `Seen` for each cause.
    """

    code: ClassVar[str]
    title: ClassVar[str]
    level: ClassVar[Level] = "warning"
    why: ClassVar[str]
    fix: ClassVar[str] = ""
    mendable: ClassVar[bool] = False
    """Whether it can be mended on the spot, safely: by putting modules into the mode they were meant to be in."""

    def configuration(self, at: Configuration) -> Iterable[Seen]:
        """Look at a model at rest, before a run or in `check`."""
        return ()

    def at_rest(self, at: Configuration) -> Iterable[Seen]:
        """Look at a model at rest in `check` alone: for what a run shows with more certainty."""
        return ()

    def batch(self, batch: Batch) -> Iterable[Seen]:
        """Look at a batch of any stage."""
        return ()

    def evaluation(self, evaluation: Evaluation) -> Iterable[Seen]:
        """Look at the end of a validation, test or prediction."""
        return ()

    def returned(self, back: Return) -> Iterable[Seen]:
        """Look at the modes when training goes on after an evaluation."""
        return ()

    def values(self, values: Values, last: str) -> Iterable[Seen]:
        """Look at the running statistics; `last` says when they were looked at before."""
        return ()

    def counts(self, batch: Batch, moved: dict[int, int], batches: int) -> Iterable[Seen]:
        """Look at how often the layers that can't be seen `moved` in `batches` training batches."""
        return ()

    def averaged(self, layers: Sequence[str]) -> Iterable[Seen]:
        """Look at layers whose weights were exchanged while their statistics were not."""
        return ()

    def gaps(self, gaps: Sequence[Gap], observer: Observer) -> Iterable[Seen]:
        """Look at how far the running statistics are from the latest batches'."""
        return ()

    def biases(self, biases: Sequence[DeadBias]) -> Iterable[Seen]:
        """Look at the biases that a batch norm takes away."""
        return ()

    def dropouts(self, dropouts: Sequence[DropoutShift]) -> Iterable[Seen]:
        """Look at the variances on either side of a dropout that feeds a batch norm."""
        return ()


def modules_of(layers: Collection[str], among: Collection[str]) -> list[str]:
    """Return the topmost modules that hold nothing of `among` but `layers`, and together hold all of these.

    Example:
        >>> modules_of(["a.0", "a.1", "b.0"], among=["a.0", "a.1", "b.0", "b.1"])
        ['a', 'b.0']
    """
    others = {above for name in among if name not in set(layers) for above in (name, *ancestors(name))}
    tops = []
    for name in layers:
        top = name
        for above in ancestors(name):
            if above in others or not above:
                break
            top = above
        tops.append(top)
    return list(dict.fromkeys(tops))


def expression(root: str, name: str) -> str:
    """Return the expression that leads to the module `name` from `root`.

    Example:
        >>> expression("self", "backbone.layer1.0.bn1")
        'self.backbone.layer1[0].bn1'
    """
    return root + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split(".") if part)


def call(setting: Setting, names: Sequence[str], method: str) -> str:
    """Return a line of code that calls `method` of every module in `names`."""
    expressions = [expression(setting.root, name) for name in names]
    if len(expressions) == 1:
        return f"{expressions[0]}.{method}()"
    if len(expressions) > 4:
        expressions = [*expressions[:3], "..."]
    return f"for module in ({', '.join(expressions)}): module.{method}()"


def listing(names: Sequence[str], shown: int = 3) -> str:
    """Return `names` in words, the first few of many."""
    words = [name or "the module itself" for name in names[:shown]]
    return ", ".join(words) + (f" and {len(names) - shown} more" if len(names) > shown else "")
