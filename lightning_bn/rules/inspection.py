"""The rules at work: an inspection shows them what a model did, and keeps each finding once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from lightning_bn.discovery import Modes
from lightning_bn.error_boundary import UNBOUNDED, ErrorBoundary
from lightning_bn.ranks.collective import Ranks
from lightning_bn.rules import RULES, Finding
from lightning_bn.rules.adjacency import Adjacency
from lightning_bn.rules.arguments import Setting, check_codes, check_patterns
from lightning_bn.rules.fit_test import FitTest
from lightning_bn.rules.layers_that_ran import LayersThatRan, UnseenLayers
from lightning_bn.rules.learning import Copies, Learning
from lightning_bn.rules.observer import Observer
from lightning_bn.rules.register import Register
from lightning_bn.rules.rule import BatchRecord, Evaluation, Occasion
from lightning_bn.rules.snapshots import StatisticsSnapshot

# Batches of so many kinds (sizes, parts that learn in turn) may take turns, each of them judged once an epoch.
_LIKE_ONE_OF = 8


class Inspection:
    """One model under observation. `findings` are all of them, and the list grows; `new` returns those
    since it was last asked.

    Args:
        model: its modules are found now.
        setting: what is known of the run apart from the model.
        ignore: codes of rules to leave out.
        fix: codes of rules whose findings are fixed at once.
        boundary: stands around every hook, and around every rule.

    Attributes:
        modes_from: which modes a training step found: those at `begin_batch`; those at the first forward, where someone
            may still have set them on purpose in between; those at the end, where nobody can say when a step begins.

    Raises:
        ValueError: an unknown code, a rule that can't be mended, or an ``allow_eval`` pattern that no module matches.
    """

    def __init__(
        self,
        model: nn.Module,
        setting: Setting,
        *,
        ignore: Sequence[str] = (),
        fix: Sequence[str] = (),
        boundary: ErrorBoundary = UNBOUNDED,
    ) -> None:
        check_codes(f"{setting.caller}(ignore={list(ignore)})", ignore, RULES)
        self.model = model
        self.setting = setting
        self.stage, self.step, self.index = "check", 0, -1
        self.trained = False
        self.modes_from: Literal["start", "forward", "end"] = "start"
        self._boundary = boundary
        self._register = Register(ignore, fix, boundary)
        self.findings, self._told = self._register.findings, 0
        self._ran = LayersThatRan()
        self._interrupted = False
        self._evaluating = False  # whether the first batch of an evaluation has begun
        self._last_check = "nothing was known of them before"
        self._adjacency: Adjacency | None = None  # until the first training batch has ended
        self._uses: Mapping[str, int] = {}
        self._find_layers()
        check_patterns(setting, self.observer.names)

    def _find_layers(self) -> None:
        """Begin anew what knows layers by their places."""
        self.observer = Observer(self.model, self._boundary)
        self.fit_test = FitTest(self.observer)
        self._unseen = UnseenLayers(self.observer)
        self._copies = Copies(self.observer)
        self._after: Modes | None = None
        self._away: Modes | None = None
        self._last: BatchRecord | None = None
        self._judged: dict[str, deque[Any]] = {}

    def attach(self, entries: Iterable[nn.Module], *, traces: bool = True) -> None:
        """Set the hooks; `entries` are the modules that a training step calls, `traces` whether a first training batch
        is to come."""
        self.observer.attach(entries)
        self._adjacency = Adjacency(self.observer) if traces else None
        self._unseen.begin(self.fit_test.batches)
        self._ask("begin", self._now)

    def renew(self, entries: Callable[[], Iterable[nn.Module]]) -> bool:
        """Observe the modules that the model has now; returns whether any came, went or was replaced since they were
        last looked for.

        Args:
            entries: returns the modules that a training step calls now.
        """
        old, traces = self.observer, self._adjacency is not None
        if list(self.model.modules()) == old.modules:
            return False
        self.close()
        self._find_layers()
        now = {layer.module: index for index, layer in enumerate(self.observer.layers)}
        places = {index: now[layer.module] for index, layer in enumerate(old.layers) if layer.module in now}
        self._ran.follow(places)
        self.observer.seen = {places[index] for index in old.seen if index in places}
        self.attach(entries(), traces=traces)
        self.tell("configuration")
        return True

    def close(self) -> None:
        """Remove every hook."""
        self.observer.close()
        self.fit_test.close()
        if self._adjacency is not None:
            self._adjacency.close()
            self._adjacency = None

    def new(self) -> list[Finding]:
        """Return the findings that were not returned before."""
        new, self._told = self.findings[self._told :], len(self.findings)
        return new

    def tell(self, occasion: str) -> None:
        """Something happens that the rules alone need to know of, one of the `OCCASIONS`."""
        self._ask(occasion, self._now)

    def begin_epoch(self) -> None:
        """Begin a training epoch: what could be told of its batches from the last one's is forgotten, as parameters may
        be frozen now."""
        self._judged = {}
        self.observer.watch_closely()
        self.fit_test.begin_epoch()
        self._ask("begin_epoch", self._now)

    def begin_batch(self, stage: str, step: int, index: int, batches: float | None = None) -> None:
        """Begin a batch.

        Args:
            batches: how many the evaluation has; None or infinity: not known.
        """
        if self.observer.forwards and self.stage != "train":
            self._judge()  # what ran before the first batch of an evaluation, or between two
        self.stage, self.step, self.index = stage, step, index
        training = stage == "train"
        if training:
            self.observer.on_input = []  # of a batch that was broken off
            self._ask("begin_batch", self._now)
            self._copies.begin()
            self.fit_test.begin_training()
            self._copies.compare()
        else:
            self._evaluating = True
            if stage != "sanity_check":
                self.fit_test.begin_batch(index, batches)
        self.observer.begin(self.observer.snapshot() if training and self.modes_from == "start" else None)

    def end_batch(self) -> None:
        """Judge the batch; of an evaluation, what comes until the next one is recorded too."""
        if self.stage != "train":
            self.observer.end()
            self._judge()
            self.fit_test.frozen = self._fixed()
            self.fit_test.end_batch(self.index)
            self.index = -1
            self.observer.begin()
            return
        self.observer.end_training_batch()
        self.fit_test.end_training_batch(self.observer.forwards)
        self.trained = True
        self._look_for_export(self._after or self.observer.modes, f"before the end of batch {self.index}")
        after = self._after = self.observer.snapshot()
        opened = self.observer.modes or after
        self._copies.compare()
        self._judge(after if self.modes_from == "end" else opened, opened, after)
        self._ask("end_batch", self._now)
        if self._adjacency is not None and any(each.training for each in self.observer.forwards):
            self._ask("graph", self._now, self._adjacency)
            self._adjacency.close()
            self._adjacency = None

    @property
    def modes(self) -> Modes:
        """The modes of all modules after a training batch and what was mended in it."""
        return self.observer.snapshot() if self._after is None else self._after

    def trace(self, outputs: Any, *, loss: bool = False) -> None:
        """Look through the autograd graph behind `outputs`, a `loss` or what the model returned; only of the first
        training batch."""
        if self._adjacency is not None:
            self._adjacency.trace(outputs, loss=loss)
            self._uses = self._adjacency.uses

    def begin_evaluation(self, stage: str, step: int, modes: Modes | None = None) -> None:
        """Begin a validation, test or prediction; `modes` are those before it, where they shall be back after it."""
        self.stage, self.step, self.index = stage, step, -1
        self._away, self._interrupted = modes, False
        self._ran.begin_evaluation()
        self._evaluating = False
        self.fit_test.share = self.setting.share
        self.fit_test.begin_evaluation()
        self._ask("begin_evaluation", self._now)
        self._judged.pop(stage, None)
        # Its hooks say nothing: what it wrote shows in a comparison alone.
        self._unseen.begin_evaluation()
        self.observer.watch_closely()
        self.observer.begin()

    def end_evaluation(self) -> None:
        """Judge what the evaluation left behind; waits for the device."""
        self.observer.end()
        self.index = -1
        self._judge()
        reading = StatisticsSnapshot(self.observer.layers)
        counted = self._unseen.counted_in_evaluation(reading)
        sanity = self.stage == "sanity_check"
        values = reading.values() if self._ran.evaluated and not sanity else None
        evaluation = self._evaluation()
        evaluation.values, evaluation.counted = values, counted
        if not sanity:
            evaluation.other_sets = self._ran.values_of_other_sets(self.observer)
            evaluation.copies = self._copies.stale(self._ran.only_evaluated) if self.trained else ()
            self.fit_test.settle()
            evaluation.fit = self.fit_test.result
            if self.fit_test.layers is not None:
                channels = self.fit_test.layers.vanishing()
                evaluation.vanishing = {self.observer.layers[i].name: found for i, found in channels.items()}
            self._tell_fit(evaluation)
        self._ask("evaluation", evaluation)
        self.fit_test.close()
        self._ask("end_batch", self._now)

    def begin_evaluating_call(self) -> None:
        """A call begins, in a loop of which stages are not known, that is the first of an evaluation."""
        self.fit_test.alone = not Ranks(task=self.setting.caller).are_several
        self.fit_test.frozen = self._fixed()
        self.fit_test.begin_evaluation()
        self.fit_test.begin_batch(0, 1)

    def end_evaluating_call(self) -> None:
        """Judge by it whether the statistics fit; waits for the device."""
        self.fit_test.end_batch(0)
        at = self._evaluation()
        at.stage, at.fit = "evaluation", self.fit_test.result
        self._tell_fit(at)
        self.fit_test.begin_evaluation()

    def finish(self) -> None:
        """End a loop of which stages and batches are not known: judge the forwards since the last step, and the
        statistics."""
        try:
            self.observer.end()
            self._judge()
            self._decide()
            if self.trained:
                self.end_evaluation()
            self.examine()
        finally:
            self.close()

    def interrupt(self) -> None:
        """End with an exception: judge the forwards before it, and remember that the modes may not be put back."""
        self._interrupted = True
        self.observer.end()
        self._judge()
        self.close()

    def returned(self) -> None:
        """Go on training: look whether the modes are again what they were before the last evaluation, once for each."""
        self.stage = "train"
        before, self._away = self._away, None
        if before is not None and len(before) == len(self.observer.modules):
            if self._look_for_export(before, "since the last training batch"):
                return
            self._ask("returned", self._now, before, self._interrupted)

    def _look_for_export(self, before: Modes | None, when: str) -> bool:
        """Compare the modes with those `before` an exporter ran the model; returns whether one did and changed any."""
        exported, self.observer.exported = self.observer.exported, False
        if not exported or before is None or before == self.observer.snapshot():
            return False
        self._ask("exported", self._now, before, when)
        return True

    def left(self) -> None:
        """Look at what a fit leaves, when nobody will exchange weights any more; waits for the device."""
        self.fit_test.frozen = self._fixed()
        self.fit_test.share = self.setting.share
        at = self._evaluation()
        at.fit = self.fit_test.after_training()
        self._tell_fit(at)
        if self.trained:
            at.values = StatisticsSnapshot(self.observer.layers).values()
            at.copies = self._copies.stale(self._ran.only_evaluated)
            self._ask("ended", at)

    def examine(self) -> None:
        """Look at the values of the running statistics; waits for the device."""
        last, self._last_check = self._last_check, f"they were sound at step {self.step}"
        if self.trained and self._unseen.places:
            self._ask("counts", self._batch(), *self._unseen.counted(self.fit_test.batches))
        self._ask("examine", self._now)
        if self._register.ask_of_values(self._now, last):
            self._after = None

    def end_epoch(self) -> None:
        """Compare the running statistics with the latest batches'; waits for the device."""
        self._decide()
        self._ask("end_epoch", self._now)

    def _fixed(self) -> set[int]:
        """The layers whose statistics training does not move: they ran in eval mode in it, or are meant to."""
        layers = enumerate(self.observer.layers)
        return self._ran.steady | {index for index, layer in layers if self.setting.allows_eval(layer.name)}

    def _evaluation(self) -> Evaluation:
        return Evaluation(**vars(self._now), ran=self._ran, trained=self.trained, fitting=self._away is not None)

    def _tell_fit(self, evaluation: Evaluation) -> None:
        told = {name for code in ("BN204", "BN209") for name in self._register.reported(code)}
        if evaluation.fit is not None:
            self._ask("fit", evaluation, evaluation.fit, told)

    def _decide(self) -> None:
        """By now an averaged copy would have been written: what is frozen and was not is frozen."""
        last, self._last = self._last, None
        stale = self._copies.stale(self._ran.only_evaluated) if self.stage == "train" else []
        self._copies.look()
        if stale:
            self._ask("copies", self._now, self._now.named(stale))
        if last is not None:
            self._ask("batch", replace(last, step=self.step, averaged=self._averaged(), undecided=()))

    def _averaged(self) -> list[str]:
        return self._now.named(sorted(self._copies.written))

    @property
    def _now(self) -> Occasion:
        return Occasion(self.observer, self.setting, self.stage, self.step, self.index, self._copies.held)

    def _judge(self, before: Modes = (), opened: Modes = (), after: Modes = ()) -> None:
        """Show the batch to the rules, unless it is like one of the last of its stage; without modes, its forwards
        alone."""
        signature = (self.observer.forwards, before, opened, after, len(self.observer.entered_backward))
        known = self._judged.setdefault(self.stage, deque(maxlen=_LIKE_ONE_OF))
        # What is mended and comes back is to be mended again.
        if signature in (list(known)[-1:] if self._register.mends else known):
            return
        known.append(signature)
        self._ran.remember(self.observer, training=self.stage == "train")
        batch = self._batch(before, opened, after)
        if batch.undecided:
            self._last = batch
        self._ask("batch" if self.stage == "train" else "other_batch", batch)

    def _batch(self, before: Modes = (), opened: Modes = (), after: Modes = ()) -> BatchRecord:
        training = self.stage == "train"
        learning = Learning(self.observer, self.setting) if training else None
        if learning is not None:
            self._copies.hold(index for index, layer in enumerate(self.observer.layers) if learning.frozen(layer))
        return BatchRecord(
            **vars(self._now),
            before=before,
            opened=opened,
            after=after,
            early=not training and not self._evaluating,
            explained={name for code in ("BN103", "BN105") for name in self._register.reported(code)},
            forwards=self.observer.forwards,
            entered_backward=self.observer.entered_backward,
            learning=learning,
            averaged=self._averaged() if training else (),
            undecided=() if learning is None else self._copies.undecided(learning),
            largest=self._ran.largest,
            uses=self._uses,
        )

    def _ask(self, occasion: str, at: Occasion, *evidence: object) -> None:
        if self._register.ask(occasion, at, *evidence):
            self._after = None  # modes were mended
