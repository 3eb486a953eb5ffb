"""The rules about running statistics that do not fit the weights: of other weights, or far behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from lightning_bn.rules.gaps import GAP_LOG_RATIO, LEAST_TRACKED, START_FORGOTTEN, Gap
from lightning_bn.rules.observer import Observer
from lightning_bn.rules.rule import Evaluation, Exchange, Fix, Level, Rule, Seen

__all__ = ["MISMATCH_RULES"]

GAP_SHIFT = 0.5
"""BN208: the mean is off by half a standard deviation of what the layer normalises, root mean square over its
channels."""


class OtherWeights(Rule):
    code = "BN207"
    title = "averaged weights with statistics of other weights"
    level = "error"
    why = "the statistics were gathered with weights that are not the ones evaluated; accuracy can fall to chance."

    def averaged(self, exchange: Exchange) -> Iterator[Seen]:
        if exchange.layers:
            yield Seen(
                exchange.layers,
                "the weights were exchanged, as weight averaging does, and the running statistics were not.",
                fix=self._fix(exchange),
            )
        if exchange.far:
            yield Seen(
                list(exchange.far),
                lambda names: (
                    f"weights were exchanged, and statistics with them: at {names[0]} {exchange.stage} divides by a "
                    f"spread {exchange.far[names[0]]:.1f} times off."
                ),
                level="warning",
                fix=self._fix(exchange),
                worst_first=True,
            )

    def _fix(self, exchange: Exchange) -> Fix:
        root = exchange.setting.root
        if exchange.where == "inside":
            return Fix(f"with recalibrated({root}, batches):", "around that forward")
        if exchange.where == "after":
            return Fix(
                f"recalibrate({root}, batches)", "after training", "or callbacks=[..., BatchNormRecalibration()]"
            )
        return Fix('callbacks=[..., BatchNormRecalibration(when="validation")]', "in the Trainer")


class TrainEvalGap(Rule):
    code = "BN208"
    title = "the running statistics are far from the batches'"
    why = "evaluation normalises differently from training: the train/eval gap."

    def gaps(self, gaps: Sequence[Gap], observer: Observer) -> Iterator[Seen]:
        for level in ("warning", "info"):
            wide = [gap for gap in _wide(gaps) if (_weight_of_start(gap) > START_FORGOTTEN) == (level == "info")]
            if wide:
                yield self._seen(wide, lambda gap: (
                    f"against the last {gap.updates} updates the mean of {gap.layer.name} is {gap.shift:.2f} "
                    f"deviations off, its variance by a factor of {math.exp(gap.log_ratio):.1f}."
                ), "warning" if level == "warning" else "info")  # fmt: skip

    def evaluation(self, evaluation: Evaluation) -> Iterator[Seen]:
        read = [
            gap
            for gap in evaluation.gaps
            if any(evaluation.observer.layers[i].name == gap.layer.name for i in evaluation.evaluated)
        ]
        wide = [gap for gap in _wide(read) if gap.tracked >= LEAST_TRACKED]
        if wide:
            yield self._seen(wide, lambda gap: (
                f"at {gap.layer.name} {evaluation.stage} divides by a spread {math.exp(gap.log_ratio / 2):.1f} times "
                "off, around a mean "
                f"{gap.shift:.1f} deviations off; {_weight_of_start(gap):.0%} of the average is still the 0 and 1 it "
                f"began with."
            ), "warning")  # fmt: skip

    def _seen(self, wide: Sequence[Gap], event: Callable[[Gap], str], level: Level) -> Seen:
        by_name = {gap.layer.name: gap for gap in wide}
        fix = Fix(
            'callbacks=[..., BatchNormRecalibration(when="validation")]',
            "in the Trainer",
            "or convert_batch_norm(model, Window(20))",
        )
        return Seen(list(by_name), lambda names: event(by_name[names[0]]), level, fix, worst_first=True)


def _wide(gaps: Sequence[Gap]) -> list[Gap]:
    """Return the gaps beyond the limits, the widest first."""
    wide = [gap for gap in gaps if gap.shift > GAP_SHIFT or gap.log_ratio > GAP_LOG_RATIO]
    return sorted(wide, key=lambda gap: max(gap.shift / GAP_SHIFT, gap.log_ratio / GAP_LOG_RATIO), reverse=True)


def _weight_of_start(gap: Gap) -> float:
    momentum = gap.layer.module.momentum
    return float((1 - momentum) ** gap.tracked) if momentum is not None else 0.0


MISMATCH_RULES: tuple[Rule, ...] = (OtherWeights(), TrainEvalGap())
