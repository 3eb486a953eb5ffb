"""The rules at work: an inspection shows them what a model did, and keeps each finding once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import nn

from lightning_bn.error_boundary import UNBOUNDED, ErrorBoundary
from lightning_bn.ranks.collective import Ranks, share
from lightning_bn.rules import RULES, Finding, Rule
from lightning_bn.rules.adjacency import Adjacency, BiasBeforeBatchNorm, DropoutBeforeBatchNorm
from lightning_bn.rules.arguments import Setting, check_codes, check_patterns
from lightning_bn.rules.boundaries import Boundaries, MovedBetweenBatches
from lightning_bn.rules.evaluations import RanksApart, StaleCopy
from lightning_bn.rules.fit_test import FitTest
from lightning_bn.rules.layers_that_ran import LayersThatRan, UnseenLayers
from lightning_bn.rules.learning import Copies, Learning
from lightning_bn.rules.modes import ModeChangedInTraining
from lightning_bn.rules.observer import Modes, Observer
from lightning_bn.rules.order import BatchOrder, SortedBatches
from lightning_bn.rules.register import Moment, Register
from lightning_bn.rules.rule import BatchRecord, Configuration, Evaluation, Return, Seen
from lightning_bn.rules.snapshots import StatisticsSnapshot, ranks_apart, waiting_sets

# Batches of so many kinds (sizes, parts that learn in turn) may take turns, each of them judged once an epoch.
_LIKE_ONE_OF = 8


class Inspection:
    """One model under observation. `findings` are all of them, `new` returns those since it was last asked.

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
        self._boundary = boundary
        self.observer = Observer(model, boundary)
        self.setting = setting
        self._register = Register(ignore, fix, boundary)
        self.stage, self.step, self.index = "check", 0, -1
        self.trained = False
        check_patterns(setting, self.observer.names)
        self.modes_from: Literal["start", "forward", "end"] = "start"
        self._after: Modes | None = None
        self._judged: dict[str, deque[Any]] = {}
        self._ran = LayersThatRan()
        self._away: Modes | None = None
        self._interrupted = False
        self._evaluating = False  # whether the first batch of an evaluation has begun
        self._last_check = "nothing was known of them before"
        self._fit = FitTest(self.observer, boundary)
        self._unseen = UnseenLayers(self.observer)
        self._copies = Copies(self.observer)
        self._boundaries = Boundaries(self.observer.layers)
        self._order = BatchOrder()
        self._last: BatchRecord | None = None
        self._adjacency: Adjacency | None = None
        self._uses: Mapping[str, int] = {}

    def attach(self, entries: Iterable[nn.Module]) -> None:
        """Set the hooks; `entries` are the modules that a training step calls."""
        self._watch(entries)
        self._adjacency = Adjacency(self.model, self.observer.layers, self._boundary)

    def _watch(self, entries: Iterable[nn.Module]) -> None:
        self.observer.attach(entries)
        self._unseen.begin(self._fit.batches)

    @property
    def tracing(self) -> bool:
        """Whether `trace` is still to be told what the first training batch computed."""
        return self._adjacency is not None and self._adjacency.tracing

    def renew(self, entries: Callable[[], Iterable[nn.Module]]) -> bool:
        """Observe the modules that the model has now; returns whether any came, went or was replaced since they were
        last looked for.

        Args:
            entries: returns the modules that a training step calls now.
        """
        old = self.observer
        if list(self.model.modules()) == old.modules:
            return False
        old.close()
        self.observer = Observer(self.model, self._boundary)
        now = {layer.module: index for index, layer in enumerate(self.observer.layers)}
        places = {index: now[layer.module] for index, layer in enumerate(old.layers) if layer.module in now}
        self._ran.follow(places)
        self.observer.seen = {places[index] for index in old.seen if index in places}
        self._judged, self._away, self._after = {}, None, None
        # These know the layers by their places.
        self._copies, self._boundaries = Copies(self.observer), Boundaries(self.observer.layers)
        self._fit.close()
        self._fit, self._last = FitTest(self.observer, self._boundary), None
        self._unseen = UnseenLayers(self.observer)
        if self._adjacency is not None and self._adjacency.tracing:
            self._adjacency.close()
            self.attach(entries())
        else:
            self._watch(entries())
        self.configuration()
        return True

    def close(self) -> None:
        """Remove every hook."""
        self.observer.close()
        self._boundaries.forget()
        self._fit.close()
        if self._adjacency is not None:
            self._adjacency.close()

    @property
    def findings(self) -> list[Finding]:
        """All of them; the list grows."""
        return self._register.findings

    def new(self) -> list[Finding]:
        """Return the findings that were not returned before."""
        return self._register.new()

    def at_rest(self) -> None:
        """Look at everything that can be seen without a run."""
        self.configuration()
        at = self._at_rest
        self._ask(lambda rule: rule.at_rest(at))
        self.examine()

    def configuration(self) -> None:
        """Look at the configuration of the layers before training."""
        at = self._at_rest
        self._ask(lambda rule: rule.configuration(at))

    def begin_epoch(self) -> None:
        """Begin a training epoch: what could be told of its batches from the last one's is forgotten, as parameters may
        be frozen now."""
        self._judged = {}
        self.observer.watch_closely()
        self._order.begin_epoch()
        self._fit.begin_epoch()

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
            self._compare_boundary(f"before batch {index}")
            self._copies.begin()
            self._fit.begin_training()
            self._copies.compare()
            self.observer.on_input = self._order.begin_batch()
        else:
            self._evaluating = True
            if stage != "sanity_check":
                self._fit.begin_batch(index, batches)
        self.observer.begin(self.observer.snapshot() if training and self.modes_from == "start" else None)

    def end_batch(self) -> None:
        """Judge the batch; of an evaluation, what comes until the next one is recorded too."""
        if self.stage != "train":
            self.observer.end()
            self._judge()
            self._fit.frozen = self._fixed()
            self._fit.end_batch(self.index)
            self.index = -1
            self.observer.begin()
            return
        self.observer.end_training_batch()
        self._fit.end_training_batch(self.observer.forwards)
        self.trained = True
        self._look_for_export(self._after or self.observer.modes, f"before the end of batch {self.index}")
        after = self._after = self.observer.snapshot()
        opened = self.observer.modes or after
        self._copies.compare()
        self._judge(after if self.modes_from == "end" else opened, opened, after)
        self._boundaries.leave()
        if self._adjacency is not None and self.tracing and any(each.training for each in self.observer.forwards):
            biases = self._adjacency.dead_biases()
            self._adjacency.close()  # what was measured of dropouts stays on the device until the next check
            self._tell(rule := BiasBeforeBatchNorm(), partial(rule.seen, biases))

    @property
    def modes(self) -> Modes:
        """The modes of all modules after a training batch and what was mended in it."""
        return self.observer.snapshot() if self._after is None else self._after

    def trace(self, outputs: Any, *, loss: bool = False) -> None:
        """Look through the autograd graph behind `outputs`, a `loss` or what the model returned; only of the first
        training batch."""
        if self._adjacency is not None and self.tracing:
            self._adjacency.trace(outputs, loss=loss)
            self._uses = self._adjacency.uses

    def begin_evaluation(self, stage: str, step: int, modes: Modes | None = None) -> None:
        """Begin a validation, test or prediction; `modes` are those before it, where they shall be back after it."""
        self._compare_boundary(f"before {stage}", before_evaluation=True)
        self.stage, self.step, self.index = stage, step, -1
        self._away, self._interrupted = modes, False
        self._ran.begin_evaluation()
        self._evaluating = False
        self._fit.share = self.setting.share
        self._fit.begin_evaluation()
        if self.setting.own_statistics:
            self._compare_ranks()
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
        evaluation.values, evaluation.counted, evaluation.held = values, counted, self._copies.held
        evaluation.trained, evaluation.fitting = self.trained, self._away is not None
        evaluation.moving = self._ran.moving
        evaluation.other_sets = {} if sanity else self._ran.values_of_other_sets(self.observer)
        evaluation.copies = self._copies.stale(self._ran.only_evaluated) if self.trained and not sanity else ()
        if not sanity:
            self._fit.settle()
            evaluation.fit = self._fit.result
            if self._fit.layers is not None:
                channels = self._fit.layers.vanishing()
                evaluation.vanishing = {self.observer.layers[i].name: found for i, found in channels.items()}
            self._tell_fit(evaluation)
        self._ask(lambda rule: rule.evaluation(evaluation))
        self._fit.end_evaluation()
        self._boundaries.leave()

    def begin_evaluating_call(self) -> None:
        """A call begins, in a loop of which stages are not known, that is the first of an evaluation."""
        self._fit.alone = not Ranks(task=self.setting.caller).are_several
        self._fit.frozen = self._fixed()
        self._fit.begin_evaluation()
        self._fit.begin_batch(0, 1)

    def end_evaluating_call(self) -> None:
        """Judge by it whether the statistics fit; waits for the device."""
        self._fit.end_batch(0)
        stage, self.stage = self.stage, "evaluation"
        at = self._evaluation()
        at.fit = self._fit.result
        self._tell_fit(at)
        self.stage = stage
        self._fit.end_evaluation()
        self._fit.begin_evaluation()

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
            back = Return(self.observer, self.setting, before, self.observer.snapshot(), self._interrupted)
            self._ask(lambda rule: rule.returned(back))

    def _look_for_export(self, before: Modes | None, when: str) -> bool:
        """Compare the modes with those `before` an exporter ran the model; returns whether one did and changed any."""
        exported, self.observer.exported = self.observer.exported, False
        if not exported or before is None or before == self.observer.snapshot():
            return False
        self._tell(rule := ModeChangedInTraining(), partial(rule.exported, self._at_rest, before, when))
        return True

    def anchor(self) -> None:
        """The weights are those that training has left: an exchange is told from them."""
        self._fit.anchor()

    def boundary(self) -> None:
        """From here on, what moves statistics outside of batches is told."""
        self._boundaries.leave()

    def end_training(self) -> None:
        """Look at what moved after the last batch."""
        self._compare_boundary("after the last batch")

    def left(self) -> None:
        """Look at what a fit leaves, when nobody will exchange weights any more; waits for the device."""
        self._fit.frozen = self._fixed()
        self._fit.share = self.setting.share
        at = self._evaluation()
        at.held, at.fit = self._copies.held, self._fit.after_training()
        self._tell_fit(at)
        if self.trained:
            at.values = StatisticsSnapshot(self.observer.layers).values()
            at.copies = self._copies.stale(self._ran.only_evaluated)
            self._ask(lambda rule: rule.ended(at))

    def examine(self) -> None:
        """Look at the values of the running statistics; waits for the device."""
        reading, last = StatisticsSnapshot(self.observer.layers), self._last_check
        self._last_check = f"they were sound at step {self.step}"
        self._count(reading)
        if self._adjacency is not None and not self.tracing:
            shifts, self._adjacency = self._adjacency.dropout_shifts(), None
            self._tell(rule := DropoutBeforeBatchNorm(), partial(rule.seen, shifts, self.setting.root))
        self._examine(reading, last)
        for name, layers in waiting_sets(self.observer.layers).items():
            self._examine(StatisticsSnapshot(layers), last, name)

    def _examine(self, reading: StatisticsSnapshot, last: str, in_set: str | None = None) -> None:
        if not reading.sound():
            values = reading.values()
            self._ask(lambda rule: rule.values(values, last, self.setting.root, in_set))

    def end_epoch(self) -> None:
        """Compare the running statistics with the latest batches'; waits for the device."""
        self._decide()
        order = self._order.found()
        if order is not None:
            name = next(layer.name for layer in self.observer.layers if layer.tracks)
            self._tell(rule := SortedBatches(), partial(rule.seen, name, order))

    def _fixed(self) -> set[int]:
        """The layers whose statistics training does not move: they ran in eval mode in it, or are meant to."""
        layers = enumerate(self.observer.layers)
        return self._ran.steady | {index for index, layer in layers if self.setting.allows_eval(layer.name)}

    def _evaluation(self) -> Evaluation:
        return Evaluation(self.observer, self.setting, self.stage, self._ran.evaluated, self._ran.steady)

    def _tell_fit(self, evaluation: Evaluation) -> None:
        told = {name for code in ("BN204", "BN209") for name in self._register.reported(code)}
        if (misfit := evaluation.fit) is not None:
            self._ask(lambda rule: rule.fit(misfit, evaluation, told))

    def _decide(self) -> None:
        """By now an averaged copy would have been written: what is frozen and was not is frozen."""
        last, self._last = self._last, None
        stale = self._copies.stale(self._ran.only_evaluated) if self.stage == "train" else []
        self._copies.look()
        if stale:
            self._tell(rule := StaleCopy(), partial(rule.seen, self._names(stale), self._at_rest))
        if last is not None:
            batch = replace(last, averaged=self._averaged(), undecided=())
            self._ask(lambda rule: rule.batch(batch))

    def _averaged(self) -> list[str]:
        return self._names(sorted(self._copies.written))

    def _names(self, places: Iterable[int]) -> list[str]:
        return [self.observer.layers[place].name for place in places]

    @property
    def _at_rest(self) -> Configuration:
        return Configuration(self.observer, self.setting)

    def _compare_boundary(self, when: str, *, before_evaluation: bool = False) -> None:
        if moved := self._names(self._boundaries.back(self._copies.held)):
            rule = MovedBetweenBatches()
            self._tell(rule, partial(rule.seen, moved, when, self._at_rest, before_evaluation))

    def _compare_ranks(self) -> None:
        own = {
            index: (each.mean, each.var) for index, each in StatisticsSnapshot(self.observer.layers).values().items()
        }
        spread = ranks_apart(share(own))
        self._tell(rule := RanksApart(), partial(rule.seen, self._names(spread), max(spread.values(), default=0.0)))

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
        self._ask(lambda rule: rule.batch(batch))

    def _batch(self, before: Modes = (), opened: Modes = (), after: Modes = ()) -> BatchRecord:
        explained = {name for code in ("BN103", "BN105") for name in self._register.reported(code)}
        stage = self.stage
        batch = BatchRecord(
            self.observer,
            self.setting,
            stage,
            self.step,
            self.index,
            before,
            opened,
            after,
            stage != "train" and not self._evaluating,
            explained,
            self.observer.forwards,
        )
        if self.stage == "train":
            learning = batch.learning = Learning(self.observer, self.setting)
            self._copies.hold(index for index, layer in enumerate(self.observer.layers) if learning.frozen(layer))
            batch.averaged, batch.undecided = self._averaged(), self._copies.undecided(learning)
        batch.largest, batch.uses = self._ran.largest, self._uses
        return batch

    def _count(self, reading: StatisticsSnapshot) -> None:
        """Ask the rules about layers whose count of batches rose and whose forwards were never seen."""
        if self.trained and self._unseen.places:
            batch = self._batch()
            moved, batches = self._unseen.counted(reading, self._fit.batches)
            self._ask(lambda rule: rule.counts(batch, moved, batches))

    def _ask(self, question: Callable[[Rule], Iterable[Seen]]) -> None:
        for rule in RULES.values():
            self._tell(rule, partial(question, rule))

    def _tell(self, rule: Rule, question: Callable[[], Iterable[Seen]]) -> None:
        moment = Moment(self.observer.layers, self.stage, self.step, self.setting.caller)
        if self._register.ask(rule, question, moment):
            self._after = None  # modes were mended
