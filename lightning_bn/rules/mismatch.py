"""The rules about running statistics that do not fit the weights: of other weights, or far behind them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from lightning_bn.rules.arguments import Setting
from lightning_bn.rules.finding import Fix, Level
from lightning_bn.rules.fit_test import FEW_CHANGE, Misfit
from lightning_bn.rules.fixes import RECALIBRATION
from lightning_bn.rules.rule import Evaluation, Rule, Seen

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

    def fit(self, misfit: Misfit, evaluation: Evaluation, told: Collection[str]) -> Iterator[Seen]:
        if not misfit.exchanged:
            return
        if not misfit.began:
            layers = evaluation.observer.layers
            yield Seen(
                [layer.name for layer in layers],
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

    def fit(self, misfit: Misfit, evaluation: Evaluation, told: Collection[str]) -> Iterator[Seen]:
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
        f"{stage} normalises even the training images {found.size:.1f}{bound} output deviations off at {name}, "
        f"{first}{changed}."
    )


MISMATCH_RULES: tuple[Rule, ...] = (OtherWeights(), TrainEvalGap())
