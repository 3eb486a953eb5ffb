"""The rules about train and eval mode."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.discovery import Modes, NamedModules, UnservedNorm, ancestors, find_unserved, is_inside, user_name
from lightning_bn.rules.batch_pattern import ForwardRecord
from lightning_bn.rules.finding import Fix, Level
from lightning_bn.rules.fixes import RECALIBRATION, allowed, learns
from lightning_bn.rules.rule import BatchRecord, Evaluation, Occasion, Rule, Seen
from lightning_bn.torch_internals import is_compiled


class Unseen(Rule):
    code = "BN100"
    title = "layers that the rules can judge in part or not at all"
    level = "info"
    why = "what a rule can't see it does not report, and its silence says nothing."
    fix = Fix("fit once without torch.compile, so that every rule applies", "advice")

    def configuration(self, at: Occasion) -> Iterator[Seen]:
        kinds: dict[str, list[UnservedNorm]] = {}
        for norm in find_unserved(at.model):
            if not norm.is_constant:
                kinds.setdefault(norm.reason, []).append(norm)
        for reason, norms in kinds.items():
            classes = ", ".join(dict.fromkeys(norm.kind for norm in norms))
            yield Seen(
                [norm.name for norm in norms],
                f"{classes} holds running statistics that no rule judges: {reason}.",
                fix=Fix("compare losses in train and in eval mode on the same batches", "advice"),
            )

    def counts(self, batch: BatchRecord, moved: dict[int, int], batches: int) -> Iterator[Seen]:
        if moved:
            yield Seen(
                batch.named(moved),
                "num_batches_tracked rose, and no forward was seen: no hook fires inside compiled code, and the rules "
                "that look at single forwards (BN106, BN205, BN3xx) are silent.",
            )


class ModuleInEval(Rule):
    code = "BN101"
    title = "the module itself is in eval mode during training steps"
    level = "error"
    why = "dropout does nothing and batch norm normalises with running statistics that no batch moves."
    mendable = True

    def batch(self, batch: BatchRecord) -> Iterator[Seen]:
        excused = "" in batch.explained or batch.setting.allows_eval("")
        if batch.opened and not batch.opened[0] and not batch.after[0] and not excused:
            yield Seen(
                [""],
                f"{batch.when} training was False at the first forward and at the end.",
                fix=Fix(
                    batch.mode_calls([""], _trained(batch, [""])), note="parts that stay in eval mode: .eval() after it"
                ),
                mend=partial(_train, batch, [""]),
            )


class SubmoduleInEval(Rule):
    code = "BN102"
    title = "a submodule with trainable parameters is in eval mode during training"
    why = "its batch norm learns against fixed statistics and its dropout is off; pretrained models load in this mode."
    mendable = True

    def batch(self, batch: BatchRecord) -> Iterable[Seen]:
        if not batch.opened or not batch.opened[0]:
            return ()
        modes = tuple(one or other for one, other in zip(batch.opened, batch.after, strict=True))
        # A network that training never runs may be in any mode: an averaged copy, a metric's.
        idle = {layer.name for layer in batch.layers} - {layer.name for layer in batch.by_layer()}
        if is_compiled(batch.model):
            idle = set()  # what ran can't be seen
        learning = batch.learning.parameter if batch.learning is not None else None
        return self._look(batch, eval_regions(batch.observer, modes, learning, idle), set(batch.explained), batch.when)

    def at_rest(self, at: Occasion) -> Iterable[Seen]:
        modes = at.observer.snapshot()
        return self._look(at, eval_regions(at.observer, modes), set(), "at rest") if modes[0] else ()

    def _look(self, at: Occasion, names: list[str], explained: set[str], when: str) -> Iterator[Seen]:
        setting = at.setting
        names = [
            name
            for name in names
            if not setting.allows_eval(name) and not explained.intersection((name, *ancestors(name)))
        ]
        alone = [name for name in names if isinstance(at.observer.module(name), _BatchNorm)]
        others = [name for name in names if name not in alone]
        # Batch norms alone in eval mode are what detection does on purpose: no one puts all of them there by mistake.
        groups: tuple[tuple[list[str], Level], ...] = ((others, "warning"), (alone, "info"))
        for group, level in groups:
            if group:
                code, note = at.mode_calls(group, _trained(at, group)), f"{setting.caller}({allowed(group)})"
                yield Seen(
                    group,
                    f"{when} training is False, and it has parameters that learn.",
                    level=level,
                    fix=Fix(code, note=f"or, if intended, {note}"),
                    mend=partial(_train, at, group),
                )


class ModeChangedInTraining(Rule):
    code = "BN103"
    title = "a mode was changed in the middle of training and stayed changed"
    why = "every later batch runs in the changed mode, and the place that changed it is far from where it shows."
    mendable = True

    def batch(self, batch: BatchRecord) -> Iterator[Seen]:
        if batch.after:  # of a batch that an error ended, the modes are not known
            yield from self._changed(batch, batch.before, batch.after, batch.when)

    def exported(self, at: Occasion, before: Modes, when: str) -> Iterator[Seen]:
        """Look at what an exporter has left: ``Module.train()``, with which most end, thaws frozen parts, and some
        leave the model in eval mode."""
        fix = Fix(f"with exporting({at.setting.root}):", "around the export")
        yield from self._changed(at, before, at.observer.snapshot(), f"{when} an exporter ran the model, and", fix)

    def _changed(self, at: Occasion, before: Modes, after: Modes, when: str, fix: Fix | None = None) -> Iterator[Seen]:
        observer = at.observer
        for now in (False, True):
            names = [
                name
                for name in observer.differing(before, after)
                if after[observer.names.index(name)] is now
                # To put a frozen part in eval mode at the head of the step is a way to freeze it.
                and (now or (learns(observer.module(name)) and not at.setting.allows_eval(name)))
            ]
            if names:
                yield Seen(
                    names,
                    f"{when} training went from {not now} to {now}.",
                    fix=fix or Fix(at.mode_calls(names, before), "at the end of the training step"),
                    mend=partial(observer.restore, before),
                )


class StatisticsWrittenInEvaluation(Rule):
    code = "BN104"
    title = "running statistics were written outside of training"
    level = "error"
    why = "the model is fitted to the data it is evaluated on, and its predictions depend on the order of the batches."

    def other_batch(self, batch: BatchRecord) -> Iterator[Seen]:
        moved = [layer.name for layer, forwards in batch.by_layer().items() if any(f.moved for f in forwards)]
        if moved and batch.early and not any(f.grad for f in batch.forwards):
            yield as_recalibration(moved, f"before the first batch of {batch.stage}", " without grad")
        elif moved:
            yield self._seen(batch, moved, f"{batch.when} of {batch.stage} the running statistics moved.")

    def evaluation(self, evaluation: Evaluation) -> Iterator[Seen]:
        if evaluation.counted:
            event = f"num_batches_tracked is higher after {evaluation.stage} than before."
            yield self._seen(evaluation, evaluation.named(evaluation.counted), event)

    def _seen(self, at: Occasion, names: list[str], event: str) -> Seen:
        code = at.call(at.tops(names), "eval")
        return Seen(names, event, fix=Fix(code, "at the start of the evaluation step", "and no .train() in it"))


class ModesNotPutBack(Rule):
    code = "BN105"
    title = "validation did not restore the modes"
    why = (
        "training goes on in the mode of the evaluation: in eval mode statistics stand still, in train mode a freeze "
        "is undone."
    )
    mendable = True

    def returned(self, at: Occasion, before: Modes, interrupted: bool) -> Iterator[Seen]:
        observer = at.observer
        names = observer.differing(before, observer.snapshot())
        if not names:
            return
        cause = (
            "the validation ended in an exception" if interrupted else "on_validation_model_train did not restore it"
        )
        was = before[observer.names.index(names[0])]
        yield Seen(
            names,
            f"training was {was} before the validation and is {not was} after it: {cause}.",
            fix=Fix(
                at.mode_calls(names, before),
                "instead of the override of on_validation_model_train" if not interrupted else "before fit",
            ),
            mend=partial(observer.restore, before),
        )


class MovedWithoutGrad(Rule):
    code = "BN106"
    title = "a forward that trains nothing moved the running statistics"
    why = "they become a mixture with those of other inputs, or of weights that are never evaluated."

    def batch(self, batch: BatchRecord) -> Iterator[Seen]:
        without_grad, copies, at_other_weights = [], [], []
        for layer, forwards in batch.by_layer().items():
            # The first pass of reentrant checkpointing has no grad either, and its second comes inside backward.
            if any(f.moved and not f.grad for f in forwards) and not any(f.recomputed for f in forwards):
                if layer.name in batch.averaged:
                    copies.append(layer.name)
                elif layer.name not in batch.undecided:
                    without_grad.append(layer.name)
            if visits(forwards, batch.entered_backward):
                at_other_weights.append(layer.name)
        repeats = batch.learning is not None and batch.learning.repeats
        second = f"{batch.when} a second forward of the same input, at changed weights, moved them"
        yield from self._seen(
            batch, without_grad, f"{batch.when} a training-mode forward under no_grad moved them.", "warning"
        )
        # A mean teacher (Tarvainen & Valpola 2017) is run like this.
        event = f"{batch.when} a copy whose weights are averaged ran in training mode under no_grad."
        yield from self._seen(batch, copies, event, "info")
        yield from self._seen(
            batch,
            at_other_weights,
            f"{second} (as LBFGS does)." if repeats else f"{second} (as in SAM).",
            "info" if repeats else "warning",
        )

    def _seen(self, batch: BatchRecord, names: list[str], event: str, level: Level) -> Iterator[Seen]:
        if names:
            target, is_whole = batch.around(names), len(batch.tops(names)) > 1
            note = "" if is_whole else f"or {target}.eval() if its running statistics are to be used"
            yield Seen(names, event, level, Fix(f"with paused_statistics({target}):", "around that forward", note))


def as_recalibration(layers: Sequence[str], when: str, how: str = "") -> Seen:
    """Return what is seen where somebody may have recalibrated `layers`."""
    return Seen(
        layers,
        f"{when} the model ran in training mode{how}, as a recalibration of the statistics does.",
        "info",
        RECALIBRATION,
        "with training batches this is right; the callback does it by pooled moments, and puts all else back.",
    )


def visits(forwards: Sequence[ForwardRecord], entered_backward: Collection[int]) -> list[ForwardRecord]:
    """Return those of a layer's forwards that were a second one in sharpness-aware minimisation.

    That is: of the same input as an earlier one, at other weights, and with a backward of its own. A GAN's parts are
    called again at other weights too, but with another input, or without a backward.
    """
    return [
        forward
        for place, forward in enumerate(forwards)
        if forward.moved
        and forward.reweighted
        and not forward.recomputed
        and forward.call in entered_backward
        and any(earlier.source == forward.source for earlier in forwards[:place])
    ]


def eval_regions(
    model: NamedModules,
    modes: Modes,
    learning: Callable[[nn.Parameter], bool] | None = None,
    idle: Collection[str] = (),
) -> list[str]:
    """Return the topmost modules in eval mode that hold parameters that learn, of their own or in parts likewise in
    eval mode.

    Args:
        model: knows the modules.
        modes: theirs.
        learning: whether a parameter learns; None: whether it requires grad.
        idle: batch-norm layers that did not run: a region whose every layer is among them is left out.
    """
    learning = learning or (lambda parameter: parameter.requires_grad)
    in_eval = {
        name: module for name, module, training in zip(model.names, model.modules, modes, strict=True) if not training
    }
    tops = []
    for name, module in in_eval.items():
        if any(learning(parameter) for parameter in module.parameters(recurse=False)):
            above = name
            for parent in ancestors(name):
                if parent not in in_eval:
                    break
                above = parent
            tops.append(above)
    inside = {top: {layer.name for layer in model.layers if is_inside(layer.name, top)} for top in tops}
    return [top for top, layers in inside.items() if not layers or not layers <= set(idle)]


def _trained(at: Occasion, tops: list[str]) -> Modes:
    """Return the modes after `_train`, which are given back at once."""
    before = at.observer.snapshot()
    try:
        _train(at, tops)
        return at.observer.snapshot()
    finally:
        at.observer.restore(before)


def _train(at: Occasion, tops: list[str]) -> None:
    """Put the modules in train mode and what is below them, but whatever is frozen or may stay in eval mode, with all
    below it."""

    def walk(module: nn.Module, name: str) -> None:
        parameters = list(module.parameters())
        if at.setting.allows_eval(name) or (
            parameters and not any(parameter.requires_grad for parameter in parameters)
        ):
            return
        module.training = True
        for part, child in module.named_children():
            walk(child, user_name(f"{name}.{part}" if name else part))

    for top in tops:
        walk(at.observer.module(top), top)
