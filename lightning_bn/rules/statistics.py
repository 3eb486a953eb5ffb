"""The rules about running statistics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch

from lightning_bn.averaging import Exponential
from lightning_bn.buffers import running_mean
from lightning_bn.discovery import BatchNormLayer
from lightning_bn.rules.batch_pattern import ForwardRecord
from lightning_bn.rules.evaluations import level_of
from lightning_bn.rules.finding import Fix, Level
from lightning_bn.rules.fixes import frozen_regions
from lightning_bn.rules.modes import visits
from lightning_bn.rules.rule import BatchRecord, Evaluation, Occasion, Rule, Seen
from lightning_bn.rules.snapshots import LayerValues, StatisticsSnapshot, Values, learned, unsure

DEAD_ZONE = 0.05
"""BN206: the relative distance from the truth at which 16-bit statistics may stop, ``finfo.eps / (2 * momentum)``."""


class FrozenMoves(Rule):
    code = "BN201"
    title = "a frozen layer still moves its statistics"
    why = "requires_grad=False fixes only the weights: the features below the head drift while it learns to read them."
    mendable = True

    def batch(self, batch: BatchRecord) -> Iterable[Seen]:
        moved = [
            layer
            for layer, forwards in batch.by_layer().items()
            if any(f.moved and f.grad for f in forwards) and self._stands_still(batch, layer)
        ]
        return self._seen(batch, moved, f"{batch.when} its running statistics moved")

    def counts(self, batch: BatchRecord, moved: dict[int, int], batches: int) -> Iterable[Seen]:
        layers = [layer for index in moved if self._stands_still(batch, layer := batch.layers[index])]
        return self._seen(batch, layers, f"num_batches_tracked rose in {batches} batches")

    def at_rest(self, at: Occasion) -> Iterable[Seen]:
        layers = [
            layer
            for layer in at.layers
            if layer.frozen and layer.tracks and layer.module.training and layer.module.momentum != 0
        ]
        return self._seen(at, layers, "it is in train mode, so every training batch will move them")

    def _stands_still(self, batch: BatchRecord, layer: BatchNormLayer) -> bool:
        frozen = layer.frozen if batch.learning is None else batch.learning.frozen(layer)
        return frozen and layer.name not in batch.averaged and layer.name not in batch.undecided

    def _seen(self, at: Occasion, layers: list[BatchNormLayer], event: str) -> Iterator[Seen]:
        if not layers:
            return
        names = [layer.name for layer in layers]
        learning = at.learning if isinstance(at, BatchRecord) else None
        left_out = learning is not None and all(learning.left_out(layer) for layer in layers)
        cause = "no optimizer holds a parameter of the layer" if left_out else "no parameter of the layer requires grad"
        modules = frozen_regions(names, at.observer, learning.parameter if learning is not None else None)
        # A finetuning callback freezes for a while, with statistics that move on by design.
        yield Seen(
            names,
            f"{event}; {cause}.",
            level="info" if at.setting.scheduled else None,
            fix=Fix(
                at.call(modules, "eval"),
                note="once: Lightning keeps the mode; for data unlike those of its training "
                f'recalibrate({at.setting.root}, batches, layers="all") before it',
            ),
            mend=partial(_put_into_eval, layers),
        )


class MovedTwice(Rule):
    code = "BN202"
    title = "statistics moved more than once per batch"
    why = "the effective momentum is higher than the one that was set, and a batch counts more than once."

    def batch(self, batch: BatchRecord) -> Iterator[Seen]:
        by_cause: dict[tuple[str, Level, Fix], list[str]] = defaultdict(list)
        for layer, forwards in batch.by_layer_and_set():
            elsewhere = visits(forwards, batch.entered_backward)
            moved = [f for f in forwards if f.moved and (f.grad or f.recomputed) and f not in elsewhere]
            if any(f.recomputed for f in moved) or len(moved) > 1:
                by_cause[self._cause(batch, layer, moved)].append(layer.name)
        for (cause, level, fix), names in by_cause.items():
            yield Seen(names, f"{batch.when} {cause}.", level=level, fix=fix)

    def counts(self, batch: BatchRecord, moved: dict[int, int], batches: int) -> Iterator[Seen]:
        names = batch.named(index for index, rise in moved.items() if rise > batches)
        if names:
            event = f"num_batches_tracked rose by up to {max(moved.values())} in {batches} batches"
            yield Seen(names, f"{event}; which forward did it can't be seen here.")

    def _cause(self, batch: BatchRecord, layer: BatchNormLayer, moved: list[ForwardRecord]) -> tuple[str, Level, Fix]:
        if any(f.recomputed for f in moved):
            fix = Fix(
                f"convert_batch_norm({batch.setting.root})",
                note="this package's layers tell a recomputation from a batch",
            )
            return "activation checkpointing ran the forward a second time, inside backward", "warning", fix
        if not layer.shared and moved[0].part_of is not None and len({(f.call, f.part_of) for f in moved}) == 1:
            fix = Fix(
                "if steps are meant, a window so many times as long, or a momentum so many times smaller", "advice"
            )
            return f"a layer was given its batch in {len(moved)} parts, as in a ghost batch norm", "info", fix
        within_one_call = len({f.call for f in moved}) < len(moved)
        if layer.shared or within_one_call:
            where = f", registered as {' and '.join(layer.names)}" if layer.shared else ""
            fix = Fix(
                "a batch norm for each place that calls it: the statistics of two places are not one distribution",
                "advice",
            )
            return f"a shared layer{where} was called {len(moved)} times", "warning", fix
        same_input = len({f.source for f in moved}) < len(moved)
        fix = Fix(
            f"with paused_statistics({batch.setting.root}):", "around that forward", "the one that should not count"
        )
        what = "an extra forward" if moved[0].call > 0 else "an extra forward, or a second use of the layer,"
        # Two views of the data, real and generated images, or parts that learn in turn: nothing counts twice that
        # should not. Nor does a loss of both forwards, that differ in their dropout (R-Drop).
        repeats = batch.learning is not None and batch.learning.repeats
        both = same_input and batch.uses.get(layer.name, 0) >= len(moved)
        level: Level = "warning" if same_input and not batch.setting.manual and not repeats and not both else "info"
        of = "the same" if same_input else "another"
        return f"{what} of {of} input moved them{', and the loss depends on each' if both else ''}", level, fix


class NotFinite(Rule):
    code = "BN203"
    title = "running statistics are not finite, or a variance is negative"
    level = "error"
    why = (
        "an average never forgets a NaN: every evaluation from here on is NaN, while training, which uses the batch, "
        "looks fine."
    )

    def values(self, at: Occasion, values: Values, last: str, in_set: str | None) -> Iterator[Seen]:
        root = at.setting.root
        bad = {each.layer.name: each.unsound for each in values.values() if each.unsound}
        if bad:

            def event(names: Sequence[str]) -> str:
                channels = bad[names[0]]
                return f"{names[0]} in channel{'s' * (len(channels) > 1)} {_numbers(channels)}; {last}."

            # What is there is mended by recalibrate(); a layer of this package skips such batches from then on.
            if in_set is None:
                mend = at.recalibration([layer for layer in at.layers if layer.name in bad])
                fix = Fix(f"convert_batch_norm({root}); {mend}", "before fit", "the first skips such batches")
            else:
                mend = f"recalibrate({root}, batches) inside of sets.use({in_set!r})"
                fix = Fix(f"convert_batch_norm({root}), which skips such batches, and {mend}", "advice")
            yield Seen(list(bad), event, fix=fix, worst_first=True)


class NeverUpdated(Rule):
    code = "BN204"
    title = "evaluation with statistics that were never updated"
    level = "error"
    why = (
        "the layer normalises with mean 0 and variance 1, which no data had: the evaluated network is not the one that "
        "was trained."
    )

    def evaluation(self, evaluation: Evaluation) -> Iterator[Seen]:
        if evaluation.trained:
            yield from self._of_other_sets(evaluation)
        if evaluation.values is None:
            return
        layers, ran = evaluation.layers, evaluation.ran
        # A frozen layer that has always run in eval mode is a constant, and the same one in training.
        meant = {
            index
            for index in ran.steady
            if index in evaluation.held or evaluation.setting.allows_eval(layers[index].name)
        }
        fit = evaluation.fit
        fitting = fit.fitting if fit is not None else ()
        judged = ran.evaluated - meant - set(evaluation.copies) - set(fitting)
        if fit is not None and not fit.began:
            return
        values = {index: each for index, each in evaluation.values.items() if index in judged}
        if not evaluation.trained:
            yield from self._loaded(evaluation, values.values())
            return
        untouched = {index: each for index, each in values.items() if each.untouched}
        # A part that training has not run yet may have its turn in a later epoch.
        waiting = {index for index in untouched if evaluation.fitting and index not in ran.trained}
        measured = fit is not None and any(layers[index].name in fit.layers for index in untouched)
        level = level_of(fit.changed) if fit is not None and measured else "error"
        groups: tuple[tuple[set[int], Level], ...] = ((set(untouched) - waiting, level), (waiting, "info"))
        for group, level in groups:
            if group:
                tracked = _numbers(sorted({untouched[index].tracked for index in group}))
                event = f"mean is 0 and variance 1 in all channels; num_batches_tracked is {tracked}."
                code = evaluation.recalibration([layers[index] for index in sorted(group)])
                fix = Fix(code, "after training", "and run the layer in training mode while it trains")
                yield Seen(evaluation.named(sorted(group)), f"after training began, {event}", level, fix)

    def _of_other_sets(self, evaluation: Evaluation) -> Iterator[Seen]:
        for name, values in evaluation.other_sets.items():
            untouched = [
                each.layer.name for index, each in values.items() if each.untouched and index not in evaluation.held
            ]
            if untouched:
                yield Seen(
                    untouched,
                    f"{evaluation.stage} used the set {name!r}, in which mean is 0 and variance 1 in all channels.",
                    fix=Fix(
                        f"train in it too, with sets.use({name!r}), or "
                        f"recalibrate({evaluation.setting.root}, batches) inside of that",
                        "advice",
                    ),
                )

    def ended(self, evaluation: Evaluation) -> Iterator[Seen]:
        return self.evaluation(evaluation)

    def at_rest(self, at: Occasion) -> Iterator[Seen]:
        yield from self._loaded(at, StatisticsSnapshot(at.layers).values().values())

    def _loaded(self, at: Occasion, among: Iterable[LayerValues]) -> Iterator[Seen]:
        # A class with a forward of its own may keep one of the two alone.
        hand_made = set(at.named(unsure(at.layers)))
        found = defaultdict(list)
        for each in among:
            if each.initial and (each.untouched or each.layer.name not in hand_made) and learned(each.layer):
                found[each.initial].append(each.layer)
        for initial, layers in found.items():
            cause = "parameters were loaded without buffers" if " and " in initial else "it was reset after training"
            yield Seen(
                [layer.name for layer in layers],
                f"weight and bias were trained, and {initial} in all channels: {cause}.",
                fix=Fix(
                    at.recalibration(layers),
                    "after training",
                    "or load the checkpoint's buffers too",
                ),
            )


class StaleBuffers(Rule):
    code = "BN205"
    title = "batch statistics in training, stale buffers in eval"
    why = (
        "track_running_stats is False, yet the buffers are there: eval normalises with them, and training never "
        "moves them."
    )

    def batch(self, batch: BatchRecord) -> Iterable[Seen]:
        layers = [
            layer
            for layer, forwards in batch.by_layer().items()
            # Within paused_statistics it is False for a while too.
            if any(f.training and not f.tracking for f in forwards) and _stale(layer)
        ]
        return self._seen(batch, layers, f"{batch.when} it normalised with the batch.")

    def at_rest(self, at: Occasion) -> Iterable[Seen]:
        return self._seen(
            at,
            [layer for layer in at.layers if layer.module.training and _stale(layer)],
            "it is in train mode.",
        )

    def _seen(self, at: Occasion, layers: list[BatchNormLayer], event: str) -> Iterator[Seen]:
        if layers:
            names = [layer.name for layer in layers]
            yield Seen(
                names,
                event,
                fix=Fix(
                    "train_bn=True", "in the schedule's call of freeze", "its default: their statistics then follow"
                )
                if at.setting.scheduled
                else Fix(
                    at.call(at.tops(names), "eval"),
                    note="BaseFinetuning.freeze(train_bn=False) leaves layers like this",
                ),
            )


class TooFewBits(Rule):
    code = "BN206"
    title = "16-bit running statistics with a momentum too small to move them"
    why = (
        "an update smaller than half the spacing of the dtype rounds to nothing: the average stops short of the truth."
    )

    def configuration(self, at: Occasion) -> Iterator[Seen]:
        stuck: dict[str, float] = {}
        momentum = 0.1
        for layer in at.layers:
            zone = dead_zone(layer)
            if zone > DEAD_ZONE:
                stuck[layer.name] = zone
                momentum = layer.module.momentum or momentum
        if stuck:
            yield Seen(
                list(stuck),
                f"they may stop {max(stuck.values()):.0%} away from the batches' statistics.",
                fix=Fix(
                    f"convert_batch_norm({at.setting.root}, Exponential({momentum}, debias=True))",
                    note="keeps them in float32, as bf16-mixed does, and leaves out the initial 0 and 1",
                ),
            )


def dead_zone(layer: BatchNormLayer) -> float:
    """Return how far from the truth, as a share of it, the layer's statistics may stop: ``eps / (2 * momentum)``; 0
    where they don't.

    An exponential average moves by ``momentum * distance``, and in a dtype with relative spacing eps a step of less
    than ``eps / 2`` rounds to nothing. A cumulative average's weight ends up smaller than any number.
    """
    module = layer.module
    if not layer.tracks or running_mean(module).dtype not in (torch.float16, torch.bfloat16):
        return 0.0
    averaging, momentum = getattr(module, "averaging", None), module.momentum
    if averaging is not None and not isinstance(averaging, Exponential):
        return 0.0
    if momentum is None:
        return 1.0
    return torch.finfo(running_mean(module).dtype).eps / (2 * momentum) if momentum else 0.0


def _put_into_eval(layers: Sequence[BatchNormLayer]) -> None:
    for layer in layers:
        layer.module.eval()


def _stale(layer: BatchNormLayer) -> bool:
    return not layer.module.track_running_stats and layer.module.running_mean is not None


def _numbers(numbers: Sequence[int], shown: int = 8) -> str:
    return ", ".join(str(number) for number in numbers[:shown]) + ", ..." * (len(numbers) > shown)
