"""The rules about what an evaluation reads: statistics that do not fit the weights, copies of a network, channels next
to nothing, layers without statistics."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_bn.discovery import NamedModules, is_inside
from lightning_bn.rules.arguments import Setting
from lightning_bn.rules.finding import Fix, Level
from lightning_bn.rules.fixes import RECALIBRATION
from lightning_bn.rules.learning import twin
from lightning_bn.rules.replay import FEW_CHANGE, Misfit
from lightning_bn.rules.rule import Evaluation, Occasion, Rule, Seen
from lightning_bn.rules.snapshots import StatisticsSnapshot


class StaleCopy(Rule):
    code = "BN209"
    title = "an averaged copy's weights move and its statistics do not"
    why = (
        "its weights are rewritten while training and its buffers are not: it normalises with statistics of weights "
        "it no longer has."
    )

    def copies(self, at: Occasion, layers: Sequence[str]) -> Iterator[Seen]:
        fix = Fix(
            at.call(at.tops(layers), "train"),
            note="as a mean teacher: it then normalises with the batch, and its statistics follow",
        )
        yield Seen(
            layers,
            "it ran in eval mode in training; its weights changed, its running statistics are those before training.",
            fix=fix,
        )

    def evaluation(self, evaluation: Evaluation) -> Iterator[Seen]:
        if not evaluation.copies:
            return
        observer, names = evaluation.observer, evaluation.named(evaluation.copies)
        modules = [part for top in evaluation.tops(names) for part in _called(top, observer, names)]
        original = twin(observer, modules[0], evaluation.ran.moving) if len(modules) == 1 else None
        if original is None:
            # An average of the weights requires no grad, and recalibrate() leaves such layers out unless it is told to.
            calls = [f'recalibrate({evaluation.path(name)}, batches, layers="all")' for name in modules]
            fix = Fix("; ".join(calls), "after training")
        else:
            own, other = evaluation.path(modules[0]), evaluation.path(original)
            pairs = f"zip({own}.buffers(), {other}.buffers(), strict=True)"
            fix = Fix(f"for own, other in {pairs}: own.copy_(other)", "after the teacher's weights are averaged")
        yield Seen(
            names,
            f"{evaluation.stage} read it; its weights changed, its running statistics are those before training.",
            fix=fix,
        )


def _called(top: str, model: NamedModules, layers: Sequence[str]) -> list[str]:
    """Return what can be called in `top` and holds some of `layers`: a list of copies has no forward."""
    module = model.module(top)
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return [top]
    parts = [f"{top}.{name}" for name, _ in module.named_children()]
    held = [part for part in parts if any(is_inside(layer, part) for layer in layers)]
    return [called for part in held for called in _called(part, model, layers)]


class VanishingVariance(Rule):
    code = "BN210"
    title = "evaluation divides a channel by almost nothing"
    why = "the channel was constant in training and varies now: evaluation multiplies its input by up to 1 / sqrt(eps)."

    def evaluation(self, evaluation: Evaluation) -> Iterator[Seen]:
        if evaluation.vanishing:
            found = evaluation.vanishing
            yield Seen(
                list(found),
                lambda names: (
                    f"at {names[0]} the running variance of channel {', '.join(map(str, found[names[0]][:8]))} is "
                    f"below 10 eps; in {evaluation.stage} its input varies 100 times as much."
                ),
                fix=Fix(
                    evaluation.recalibration([layer for layer in evaluation.layers if layer.name in found]),
                    "after training",
                    "with batches like those of the evaluation",
                ),
                worst_first=True,
            )


class DependsOnBatch(Rule):
    code = "BN211"
    title = "evaluation depends on the batch"
    level = "info"
    why = (
        "track_running_stats=False: in eval mode too the layer normalises with the batch, so a sample's result "
        "depends on its neighbours."
    )
    fix = Fix("track_running_stats=True", "where the model is built", "unless it is intended")

    def evaluation(self, evaluation: Evaluation) -> Iterator[Seen]:
        layers = [evaluation.layers[index] for index in sorted(evaluation.ran.evaluated)]
        names = [layer.name for layer in layers if layer.module.running_mean is None]
        if names:
            yield Seen(names, f"{evaluation.stage} ran it, and it keeps no running statistics.")


class RanksApart(Rule):
    code = "BN306"
    title = "each rank evaluates with its own running statistics"
    why = (
        "broadcast_buffers=False keeps them apart: each rank evaluates a different network; a checkpoint has rank 0's."
    )
    fix = Fix("plugins=[BatchNormSync()]", "in the Trainer", "or DDPStrategy() with its default broadcast_buffers=True")

    def begin_evaluation(self, at: Occasion) -> Iterator[Seen]:
        if at.setting.own_statistics and at.setting.share is not None:
            values = StatisticsSnapshot(at.layers).values()
            if spread := _apart(at.setting.share({index: (each.mean, each.var) for index, each in values.items()})):
                event = f"the running means of two ranks are up to {max(spread.values()):.2g} deviations apart."
                yield Seen(at.named(spread), event)


def _apart(of_ranks: Sequence[dict[int, tuple[Tensor, Tensor]]]) -> dict[int, float]:
    """Return, by layer, how many running deviations the means of ranks differ, where any of their statistics do; a rank
    that has failed sends nothing."""
    apart: dict[int, float] = {}
    sent = [each for each in of_ranks if each]
    for other in sent[1:]:
        for index, (mean, var) in sent[0].items():
            if index in other and not (torch.equal(mean, other[index][0]) and torch.equal(var, other[index][1])):
                distance = ((mean - other[index][0]) / (var + 1e-5).sqrt()).abs().max().item()
                apart[index] = max(distance, apart.get(index, 0.0))
    return apart


MANY_CHANGE = 0.4
"""Share of answers that change with the batch's own statistics, above which a misfit is an error."""


def level_of(changed: float | None) -> Level:
    """Return how much a misfit matters, by the share of answers that it changes; where there are none, a warning."""
    if changed is None:
        return "warning"
    return "error" if changed > MANY_CHANGE else "warning" if changed > FEW_CHANGE else "info"


class OtherWeights(Rule):
    code = "BN207"
    title = "averaged weights with statistics of other weights"
    level = "error"
    why = "the statistics were gathered with weights that are not the ones evaluated; accuracy can fall to chance."

    def fit(self, evaluation: Evaluation, misfit: Misfit, told: Collection[str]) -> Iterator[Seen]:
        if not misfit.exchanged:
            return
        if not misfit.began:
            yield Seen(
                [layer.name for layer in evaluation.layers],
                "the weights that were put in have not moved since the first training batch: the average never began, "
                f"and none of {misfit.batches} training batches has updated it.",
                fix=Fix(
                    "let the average begin before the fit ends (update_starting_at_step, update_starting_at_epoch)",
                    "advice",
                    "no statistics can mend an untrained network",
                ),
                why="what is evaluated is the network as it was before the fit.",
                title="averaged weights that no update has reached",
            )
            return
        names = [name for name in misfit.layers if name not in told]
        if names:
            yield Seen(
                names,
                lambda names: f"the weights were exchanged, and {_measured(misfit, names[0], evaluation)}",
                level_of(misfit.changed),
                self._fix(misfit, evaluation.setting.root),
                worst_first=True,
            )

    def _fix(self, misfit: Misfit, root: str) -> Fix:
        if misfit.where == "inside":
            return Fix(f"with recalibrated({root}, batches):", "around that forward")
        if misfit.where == "after":
            return Fix(
                f"recalibrate({root}, batches)", "after training", "or callbacks=[..., BatchNormRecalibration()]"
            )
        return RECALIBRATION


class TrainEvalGap(Rule):
    code = "BN208"
    title = "the running statistics are far from the batches'"
    why = "evaluation normalises differently from training: the train/eval gap."
    fix = replace(RECALIBRATION, note="or convert_batch_norm(model, Window(20))")

    def fit(self, evaluation: Evaluation, misfit: Misfit, told: Collection[str]) -> Iterator[Seen]:
        lagging = [name for name in misfit.layers if name not in told]
        if lagging and not misfit.exchanged:
            yield Seen(
                lagging,
                lambda names: _measured(misfit, names[0], evaluation),
                level_of(misfit.changed),
                self._fix_in_a_loop(evaluation.setting),
                worst_first=True,
            )
        for copy, found in misfit.copies:
            yield from self._copy(copy, found, evaluation)
        elsewhere = [name for name in misfit.only_here if name not in told and name not in misfit.layers]
        if elsewhere and misfit.began:
            yield Seen(
                elsewhere,
                lambda names: (
                    f"{evaluation.stage} is {misfit.only_here[names[0]].size:.1f} (at least "
                    f"{misfit.only_here[names[0]].lower:.1f}) deviations off at {names[0]}: its data differ from "
                    f"training's, or the statistics do not fit the weights"
                    + (f"; no training batch was run, as {misfit.left_out}." if misfit.left_out else ".")
                ),
                "info",
                self._fix_in_a_loop(evaluation.setting),
                worst_first=True,
            )

    def _copy(self, copy: str, found: Misfit, evaluation: Evaluation) -> Iterator[Seen]:
        """A copy that the model does not hold: nothing else sees it."""
        off = found.layers or found.only_here
        if not off:
            return
        first = next(iter(off))
        measured = (
            _measured(found, first, evaluation)
            if found.layers
            else f"its first such layer, {first}, is {off[first].size:.1f} deviations off there."
        )
        yield Seen(
            [f"{copy}:{name}" for name in off],
            f"{evaluation.stage} runs {copy}, which is like the model and no part of it, as an averaged copy: "
            f"{measured}",
            level_of(found.changed) if found.layers else "info",
            Fix('recalibrate(copy, batches, layers="all")', "before the evaluation", f"where copy is that {copy}"),
            worst_first=True,
        )

    def _fix_in_a_loop(self, setting: Setting) -> Fix | None:
        """A loop without a Trainer has no callbacks."""
        if setting.caller != "watch":
            return None
        return Fix(f"recalibrate({setting.root}, batches)", "before the evaluation", "with training batches")


def _measured(misfit: Misfit, name: str, evaluation: Evaluation) -> str:
    found, stage = misfit.layers[name], evaluation.stage if misfit.where != "after" else "what training leaves"
    changed = (
        "" if misfit.changed is None else f"; {misfit.changed:.0%} of answers change with the batch's own statistics"
    )
    bound = f" (at least {found.lower:.1f})" if found.lower >= 0.05 else ""  # of few images nothing is certain
    others = len(misfit.layers) - 1
    first = f"the first such layer of {others + 1}" if others else "the only such layer"
    return (
        f"{stage} normalises even the training images otherwise than training did: at {name}, {first}, outputs are "
        f"{found.size:.1f} standard deviations off{bound}{changed}."
    )
