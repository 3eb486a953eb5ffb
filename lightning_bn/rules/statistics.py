"""The rules about running statistics."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch

from lightning_bn.averaging import Exponential
from lightning_bn.discovery import BatchNormLayer
from lightning_bn.rules.modes import visits
from lightning_bn.rules.observer import Forward, Observer
from lightning_bn.rules.readings import Gap, Values
from lightning_bn.rules.rule import Batch, Configuration, Evaluation, Level, Rule, Seen, call, modules_of

__all__ = ["STATISTICS_RULES"]

DEAD_ZONE = 0.05
"""BN206: the relative distance from the truth at which 16-bit statistics may stop, ``finfo.eps / (2 * momentum)``."""

GAP_SHIFT = 0.5
"""BN208: the mean is off by half a standard deviation of what the layer normalises, root mean square over its channels."""

GAP_LOG_RATIO = math.log(2)
"""BN208: the variance is off by a factor of two, root mean square over the channels of the layer, on a logarithmic scale."""

GAP_WARM_UP = 0.05
"""BN208: while what the buffers started with still weighs more than this, a gap is no more than information."""


class FrozenMoves(Rule):
    code = "BN201"
    title = "a frozen layer still moves its statistics"
    why = "requires_grad=False holds weights alone: the features below the head drift while it learns to read them."
    mendable = True

    def batch(self, batch: Batch) -> Iterable[Seen]:
        moved = [
            layer
            for layer, forwards in (batch.by_layer().items() if batch.training else ())
            if layer.frozen and any(f.moved and f.grad for f in forwards)
        ]
        return self._seen(batch, moved, f"{batch.when} num_batches_tracked rose; no parameter of the layer requires grad.")

    def counts(self, batch: Batch, moved: dict[int, int], batches: int) -> Iterable[Seen]:
        layers = [layer for index, rise in moved.items() if (layer := batch.observer.layers[index]).frozen and rise]
        return self._seen(batch, layers, f"num_batches_tracked rose in {batches} batches; no parameter of the layer requires grad.")

    def at_rest(self, at: Configuration) -> Iterable[Seen]:
        layers = [layer for layer in at.observer.layers if layer.frozen and layer.tracks and layer.module.training]
        return self._seen(at, layers, "it is in train mode, so every training batch will move them; no parameter requires grad.")

    def _seen(self, at: Batch | Configuration, layers: list[BatchNormLayer], event: str) -> Iterator[Seen]:
        if layers:
            names = [layer.name for layer in layers]
            modules = modules_of(names, [layer.name for layer in at.observer.layers])
            yield Seen(
                names,
                event,
                fix=f"{call(at.setting, modules, 'eval')}  # once, before fit: Lightning keeps it",
                mend=lambda: [layer.module.eval() for layer in layers] and None,
            )


class MovedTwice(Rule):
    code = "BN202"
    title = "statistics moved more than once per batch"
    why = "the effective momentum is higher than the one set, and what is averaged is not one batch after another."

    def batch(self, batch: Batch) -> Iterator[Seen]:
        if not batch.training:
            return
        by_cause: dict[tuple[str, Level, str], list[str]] = defaultdict(list)
        for layer, forwards in batch.by_layer().items():
            elsewhere = visits(forwards, batch.observer)
            moved = [f for f in forwards if f.moved and (f.grad or f.recomputed) and f not in elsewhere]
            if any(f.recomputed for f in moved) or len(moved) > 1:
                by_cause[self._cause(batch, layer, moved)].append(layer.name)
        for (cause, level, fix), names in by_cause.items():
            yield Seen(names, f"{batch.when} {cause}.", level=level, fix=fix)

    def counts(self, batch: Batch, moved: dict[int, int], batches: int) -> Iterator[Seen]:
        names = [batch.observer.layers[index].name for index, rise in moved.items() if rise > batches]
        if names:
            most = max(moved.values())
            yield Seen(names, f"num_batches_tracked rose by up to {most} in {batches} batches; which forward did it can't be seen here.")

    def _cause(self, batch: Batch, layer: BatchNormLayer, moved: list[Forward]) -> tuple[str, Level, str]:
        if any(f.recomputed for f in moved):
            fix = f"convert_batch_norm({batch.setting.root})  # this package's layers tell a recomputation from a batch"
            return "activation checkpointing ran the forward a second time, inside backward", "warning", fix
        within_one_call = len({f.call for f in moved}) < len(moved)
        if layer.shared or within_one_call:
            where = f", registered as {' and '.join(layer.names)}" if layer.shared else ""
            fix = "one batch norm for each place that calls it: the statistics of two places are not one distribution"
            return f"a shared layer{where} was called {len(moved)} times", "warning", fix
        same_input = len({f.source for f in moved}) < len(moved)
        fix = f"with paused_statistics({batch.setting.root}): ...  # around the forward that should not count"
        what = "an extra forward" if moved[0].call > 0 else "an extra forward, or a second use of the layer,"
        # Two views of the data, real and generated images, or parts that learn in turn: nothing counts twice that should not.
        level: Level = "warning" if same_input and not batch.setting.manual else "info"
        return f"{what} of {'the same' if same_input else 'another'} input moved them", level, fix


class NotFinite(Rule):
    code = "BN203"
    title = "running statistics are not finite, or a variance is negative"
    level = "error"
    why = "an average never forgets a NaN: every evaluation from here on is NaN, while training, which uses the batch, looks well."

    def values(self, values: Values, last: str) -> Iterator[Seen]:
        bad = {each.layer.name: each.unsound for each in values.values() if each.unsound}
        if bad:
            name, channels = next(iter(bad.items()))
            yield Seen(
                list(bad),
                f"{name} in channel{'s' * (len(channels) > 1)} {_numbers(channels)}; {last}.",
                fix="convert_batch_norm(model)  # skips such batches; recalibrate(model, batches) mends what is there",
            )


class NeverUpdated(Rule):
    code = "BN204"
    title = "evaluation with statistics that were never updated"
    level = "error"
    why = "the layer normalises with mean 0 and variance 1, which no data had: it evaluates another network than was trained."

    def evaluation(self, evaluation: Evaluation) -> Iterator[Seen]:
        if evaluation.values is None:
            return
        # A frozen layer that has always run in eval mode is a constant, and the same one in training.
        meant = {
            index
            for index in evaluation.steady
            if evaluation.observer.layers[index].frozen or evaluation.setting.allows_eval(evaluation.observer.layers[index].name)
        }
        ran = set(evaluation.evaluated) - meant
        untouched = [each for index, each in evaluation.values.items() if index in ran and each.untouched]
        if untouched:
            tracked = sorted({each.tracked for each in untouched})
            yield Seen(
                [each.layer.name for each in untouched],
                f"after training began, mean is 0 and variance 1 in all channels; num_batches_tracked is {_numbers(tracked)}.",
                fix=f"{evaluation.setting.root}.train() while training, or recalibrate({evaluation.setting.root}, batches)",
            )


class StaleBuffers(Rule):
    code = "BN205"
    title = "batch statistics in training, stale buffers in eval"
    why = "track_running_stats is False, yet the buffers are there: eval normalises with them, and training never moves them."

    def batch(self, batch: Batch) -> Iterable[Seen]:
        layers = [
            layer
            for layer, forwards in (batch.by_layer().items() if batch.training else ())
            # Within paused_statistics it is False for a while too.
            if any(f.training and not f.tracking for f in forwards) and _stale(layer)
        ]
        return self._seen(batch, layers, f"{batch.when} it normalised with the batch.")

    def at_rest(self, at: Configuration) -> Iterable[Seen]:
        return self._seen(at, [layer for layer in at.observer.layers if layer.module.training and _stale(layer)], "it is in train mode.")

    def _seen(self, at: Batch | Configuration, layers: list[BatchNormLayer], event: str) -> Iterator[Seen]:
        if layers:
            names = [layer.name for layer in layers]
            modules = modules_of(names, [layer.name for layer in at.observer.layers])
            yield Seen(
                names,
                event,
                fix=f"{call(at.setting, modules, 'eval')}  # frozen for good; BaseFinetuning.freeze(train_bn=False) leaves this",
            )


class TooFewBits(Rule):
    code = "BN206"
    title = "16-bit running statistics with a momentum too small to move them"
    why = "an update smaller than half the spacing of the dtype rounds to nothing: the average stops short of the truth."

    def configuration(self, at: Configuration) -> Iterator[Seen]:
        stuck: dict[str, float] = {}
        for layer in at.observer.layers:
            zone = dead_zone(layer)
            if zone > DEAD_ZONE:
                stuck[layer.name] = zone
        if stuck:
            yield Seen(
                list(stuck),
                f"they may stop {max(stuck.values()):.0%} away from the batches' statistics.",
                fix="convert_batch_norm(model, Exponential(momentum))  # keeps them in float32, as precision='bf16-mixed' does",
            )


class OtherWeights(Rule):
    code = "BN207"
    title = "averaged weights beside statistics of other weights"
    level = "error"
    why = "the statistics were gathered with weights that are not the ones evaluated; accuracy can fall to chance."

    def averaged(self, layers: Sequence[str]) -> Iterator[Seen]:
        if layers:
            yield Seen(
                layers,
                "weights were exchanged for others, as averaged ones are, and the running statistics stayed.",
                fix="callbacks=[..., BatchNormRecalibration()]  # or WeightAveraging(use_buffers=True)",
            )


class TrainEvalGap(Rule):
    code = "BN208"
    title = "the running statistics are far from the batches'"
    why = "the model that is evaluated normalises otherwise than the one that learns: the train/eval gap."

    def gaps(self, gaps: Sequence[Gap], observer: Observer) -> Iterator[Seen]:
        for level in ("warning", "info"):
            wide = [gap for gap in gaps if gap.shift > GAP_SHIFT or gap.log_ratio > GAP_LOG_RATIO]
            wide = [gap for gap in wide if (_weight_of_start(gap) > GAP_WARM_UP) == (level == "info")]
            wide.sort(key=lambda gap: max(gap.shift / GAP_SHIFT, gap.log_ratio / GAP_LOG_RATIO), reverse=True)
            if wide:
                worst = wide[0]
                yield Seen(
                    [gap.layer.name for gap in wide],
                    f"against the last {worst.updates} updates the mean of {worst.layer.name} is {worst.shift:.2f} deviations off, "
                    f"its variance by a factor of {math.exp(worst.log_ratio):.1f}.",
                    level="warning" if level == "warning" else "info",
                    fix="convert_batch_norm(model, Window(20)), or callbacks=[..., BatchNormRecalibration()]",
                )


def dead_zone(layer: BatchNormLayer) -> float:
    """Return how far from the truth, as a share of it, the layer's statistics may stop: ``eps / (2 * momentum)``; 0 where they don't.

    An exponential average moves by ``momentum * distance``, and in a dtype with relative spacing eps a step of less than ``eps / 2`` rounds
    to nothing. A cumulative average's weight ends up smaller than any number.
    """
    module = layer.module
    if not layer.tracks or module.running_mean.dtype not in (torch.float16, torch.bfloat16):
        return 0.0
    averaging, momentum = getattr(module, "averaging", None), module.momentum
    if averaging is not None and not isinstance(averaging, Exponential):
        return 0.0
    if momentum is None:
        return 1.0
    return torch.finfo(module.running_mean.dtype).eps / (2 * momentum) if momentum else 0.0


def _stale(layer: BatchNormLayer) -> bool:
    return not layer.module.track_running_stats and layer.module.running_mean is not None


def _weight_of_start(gap: Gap) -> float:
    momentum = gap.layer.module.momentum
    return float((1 - momentum) ** gap.tracked) if momentum is not None else 0.0


def _numbers(numbers: Sequence[int], shown: int = 8) -> str:
    return ", ".join(str(number) for number in numbers[:shown]) + ", ..." * (len(numbers) > shown)


STATISTICS_RULES: tuple[Rule, ...] = (
    FrozenMoves(),
    MovedTwice(),
    NotFinite(),
    NeverUpdated(),
    StaleBuffers(),
    TooFewBits(),
    OtherWeights(),
    TrainEvalGap(),
)
