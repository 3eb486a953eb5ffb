"""The rules about what an evaluation reads: copies of a network, channels next to nothing, layers without
statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from lightning_bn.rules.copies import twin
from lightning_bn.rules.finding import Fix
from lightning_bn.rules.fixes import call, expression, modules_of, recalibration
from lightning_bn.rules.observer import Observer
from lightning_bn.rules.rule import Configuration, Evaluation, Rule, Seen


class StaleCopy(Rule):
    code = "BN209"
    title = "an averaged copy's weights move and its statistics do not"
    why = (
        "its weights are rewritten while training and its buffers are not: it normalises with statistics of weights "
        "it no longer has."
    )

    def seen(self, layers: Sequence[str], at: Configuration) -> Iterator[Seen]:
        """Look at averaged copies that ran in eval mode in training, and whose statistics stayed as they were."""
        modules = modules_of(layers, [layer.name for layer in at.observer.layers])
        fix = Fix(
            call(at.setting.root, modules, "train", at.model),
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
        observer, root, model = evaluation.observer, evaluation.setting.root, evaluation.model
        names = [observer.layers[index].name for index in evaluation.copies]
        tops = modules_of(names, [layer.name for layer in observer.layers])
        modules = [part for top in tops for part in _called(top, observer, names)]
        original = twin(observer, modules[0], evaluation.moving) if len(modules) == 1 else None
        if original is None:
            # An average of the weights requires no grad, and recalibrate() leaves such layers out unless it is told to.
            calls = [f'recalibrate({expression(root, name, model)}, batches, layers="all")' for name in modules]
            fix = Fix("; ".join(calls), "after training")
        else:
            own, other = (expression(root, name, model) for name in (modules[0], original))
            pairs = f"zip({own}.buffers(), {other}.buffers(), strict=True)"
            fix = Fix(f"for own, other in {pairs}: own.copy_(other)", "after the teacher's weights are averaged")
        yield Seen(
            names,
            f"{evaluation.stage} read it; its weights changed, its running statistics are those before training.",
            fix=fix,
        )


def _called(top: str, observer: Observer, layers: Sequence[str]) -> list[str]:
    """Return what can be called in `top` and holds some of `layers`: a list of copies has no forward."""
    module = observer.modules[observer.names.index(top)]
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return [top]
    parts = [f"{top}.{name}" for name, _ in module.named_children()]
    held = [part for part in parts if any(f"{layer}.".startswith(f"{part}.") for layer in layers)]
    return [called for part in held for called in _called(part, observer, layers)]


class VanishingVariance(Rule):
    code = "BN210"
    title = "evaluation divides a channel by almost nothing"
    why = "the channel was constant in training and varies now: evaluation multiplies its input by up to 1 / sqrt(eps)."

    def evaluation(self, evaluation: Evaluation) -> Iterator[Seen]:
        if evaluation.vanishing:
            found, layers = evaluation.vanishing, evaluation.observer.layers
            yield Seen(
                list(found),
                lambda names: (
                    f"at {names[0]} the running variance of channel {', '.join(map(str, found[names[0]][:8]))} is "
                    f"below 10 eps; in {evaluation.stage} its input varies 100 times as much."
                ),
                fix=Fix(
                    recalibration(evaluation.setting.root, [layer for layer in layers if layer.name in found], layers),
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
        layers = [evaluation.observer.layers[index] for index in sorted(evaluation.evaluated)]
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

    def seen(self, layers: Sequence[str], spread: float) -> Iterator[Seen]:
        """Look at layers whose statistics differ from rank to rank."""
        if layers:
            yield Seen(layers, f"the running means of two ranks are up to {spread:.2g} deviations apart.")


EVALUATION_RULES: tuple[Rule, ...] = (StaleCopy(), VanishingVariance(), DependsOnBatch(), RanksApart())
