"""Whether running statistics fit what an evaluation normalises with them: measured on its first batches, and where they
do not, on the last training batch, run once more as the evaluation runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_bn.buffers import running_mean, running_var
from lightning_bn.discovery import BatchNormLayer
from lightning_bn.error_boundary import UNBOUNDED, ErrorBoundary
from lightning_bn.layers.settlement import rule_of
from lightning_bn.modes import extra_pass, kept_attribute, paused_statistics
from lightning_bn.rules.batch_pattern import ForwardRecord
from lightning_bn.rules.fit import BatchSums, Effect, Running, batch_sums, effect
from lightning_bn.rules.observer import Observer, tensors_in
from lightning_bn.rules.snapshots import WeightSamples
from lightning_bn.sharding import local_value
from lightning_bn.torch_internals import is_compiled

__all__ = ["EVALUATED", "LEAST_BATCHES", "EvaluatedLayers", "FitTest", "Misfit"]

EVALUATED = 4
"""Batches of an evaluation that are measured."""

LEAST_BATCHES = 30
"""Training batches before which nothing is judged: torch's default average has left its start by then."""

Where = Literal["before", "inside", "after"]


@dataclass(frozen=True)
class Misfit:
    """What the test tells of one evaluation, or of the end of a fit."""

    layers: dict[str, Effect] = field(default_factory=dict)
    """Of the layers whose statistics do not fit, in the order in which they ran: the effect on the training images."""
    only_here: dict[str, Effect] = field(default_factory=dict)
    """Of layers whose statistics do not fit the evaluation's images, and fit training's, or whose training images could
    not be run: the effect on the evaluation's."""
    fitting: frozenset[int] = frozenset()
    """Indices of the layers that were judged, and whose statistics fit."""
    changed: float | None = None
    """Share of the answers to the training images that change where layers take the batch's own statistics; None where
    the model's output has none."""
    left_out: str = ""
    """Why training images were not run, in words."""
    exchanged: bool = False
    """Whether the weights that are evaluated are not those that were trained."""
    began: bool = True
    """False: the weights that were put in have not moved since training began."""
    where: Where = "before"
    """Where weights were exchanged: before the evaluation; inside of its step; after the last training step."""


class EvaluatedLayers:
    """Hooks on the layers for the length of some batches; `close` removes them. Nothing waits for the device.

    Args:
        layers: the model's batch-norm layers.
        boundary: stands around every hook.
    """

    def __init__(self, layers: Sequence[BatchNormLayer], boundary: ErrorBoundary = UNBOUNDED) -> None:
        self._layers = layers
        self._boundary = boundary
        self.running: dict[int, Tensor] = {}  # (3, C): running mean and variance, affine weight, in the first forward
        self._sums: dict[int, list[tuple[int, int, Tensor]]] = {}  # images, values of a channel in each, `batch_sums`
        self._handles: list[RemovableHandle] = [
            layer.module.register_forward_pre_hook(boundary.guard(self._look(index)), with_kwargs=True)
            for index, layer in enumerate(layers)
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def effects(self, images: Mapping[int, int], frozen: Collection[int]) -> dict[int, Effect]:
        """Return how far each layer's statistics are from what it got, in the order in which the layers ran; waits for
        the device.

        Args:
            images: in a training batch, by layer; of one that is not there, the most of any.
            frozen: layers whose statistics training does not move.
        """
        usual = max(images.values(), default=1)
        found = {}
        for index, sums in self._sums.items():
            each = [self.running[index], *(part for _, _, part in sums)]
            running, *batches = torch.cat(each).cpu().split([len(part) for part in each])
            mean, var, weight = running
            judged = effect(
                [BatchSums(n, values, *part) for (n, values, _), part in zip(sums, batches, strict=True)],
                Running(
                    mean,
                    var,
                    weight,
                    eps=self._layers[index].module.eps,
                    images=images.get(index, usual),
                    noise=0.0 if index in frozen else _noise(self._layers[index].module),
                ),
            )
            if judged is not None:
                found[index] = judged
        return found

    def vanishing(self) -> dict[int, list[int]]:
        """Return the channels of each layer whose running variance is below 10 eps while their input's, *unbiased*,
        in the first batch is 100 times as much; waits for the device."""
        found = {}
        for index, sums in self._sums.items():
            images, values, (_, biased, _, _) = sums[0]
            eps, var = self._layers[index].module.eps, self.running[index][1]
            input = biased * (images * values) / max(images * values - 1, 1)
            channels = ((var < 10 * eps) & (input > 100 * (var + eps))).nonzero().flatten().tolist()
            if channels:
                found[index] = channels
        return found

    def _look(self, index: int) -> Any:
        def look(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            input = args[0] if args else kwargs.get("input")
            if torch.compiler.is_compiling() or layer.training or not isinstance(input, Tensor):
                return
            # Of other layouts of the statistics nothing is known.
            channels = input.shape[1] if input.dim() > 1 else None
            if layer.running_mean is None or running_mean(layer).shape != (channels,) or not input.numel():
                return
            with torch.no_grad():
                if index not in self.running:
                    mean = running_mean(layer).float()
                    weight = _weight(layer)
                    kept = weight if weight is not None and weight.shape == mean.shape else torch.ones_like(mean)
                    self.running[index] = torch.stack((mean, running_var(layer).float(), kept.float()))
                sums = batch_sums(input)
            self._sums.setdefault(index, []).append((len(input), input[0, 0].numel(), sums))

        return look


class FitTest:
    """Judges each evaluation of a model, and the end of a fit.

    A training step costs a reference to its input; an evaluation, two reductions a layer in each of its first batches;
    one whose statistics do not fit, two forwards of a training batch.

    Args:
        observer: knows the layers, and what they are called with.
        boundary: stands around every hook.
    """

    def __init__(self, observer: Observer, boundary: ErrorBoundary = UNBOUNDED) -> None:
        self._observer = observer
        self._boundary = boundary
        self._model = observer.modules[0]
        self.batches = 0
        self._images: dict[int, int] = {}
        self._known: list[ForwardRecord] = []
        self._call: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None
        self._first: WeightSamples | None = None
        self._anchor: WeightSamples | None = None
        self.layers: EvaluatedLayers | None = None
        self._weights: dict[int, Tensor] = {}
        self._judged_at = -1
        self._last = 0
        self.frozen: Collection[int] = ()
        """Indices of the layers that ran in eval mode in training: for them nothing is told."""
        self.several = False
        """Whether there are other ranks, whose forwards may have to meet this one's."""
        self.result = Misfit()
        """Of the latest evaluation."""

    def begin_training(self) -> None:
        """A training batch begins: of the first, the weights are kept."""
        if self._first is None:
            self._first = WeightSamples(self._model)

    def end_training_batch(self, forwards: list[ForwardRecord]) -> None:
        """A training batch has ended."""
        self.batches += 1
        self._call = self._observer.first_call
        if forwards is not self._known:
            self._known = forwards
            self._images.update({each.layer: each.samples for each in forwards if each.samples})

    def anchor(self) -> None:
        """The weights are those that training has left."""
        self._anchor = WeightSamples(self._model) if self.batches else None

    def begin_evaluation(self) -> None:
        """An evaluation begins."""
        self.close()
        self.result = Misfit()
        self.layers = None

    def begin_batch(self, index: int, batches: float | None) -> None:
        """Batch number `index` of `batches` of the evaluation begins."""
        if index == 0 and self.layers is None and not is_compiled(self._model):  # a hook would compile it anew
            self.layers = EvaluatedLayers(self._observer.layers, self._boundary)
            self._last = int(min(batches or EVALUATED, EVALUATED)) - 1
        if self.layers is not None and index == self._last:
            modules = enumerate(self._observer.layers)
            self._weights = {i: weight.clone() for i, each in modules if (weight := _weight(each.module)) is not None}
            self._observer.on_leave = self._left

    def end_batch(self, index: int) -> None:
        """Batch number `index` of the evaluation has ended."""
        self._observer.on_leave = None
        if self.layers is not None and index == self._last and self._judged_at != index:
            self._judge("before")

    def end_evaluation(self) -> None:
        """The evaluation has ended."""
        self.close()
        self._judged_at = -1

    def close(self) -> None:
        """Remove the hooks."""
        self._observer.on_leave = None
        if self.layers is not None:
            self.layers.close()

    def _left(self) -> None:
        """A call of the model has ended; the weights may be back before the step ends."""
        self._observer.on_leave = None
        if self.layers is None:
            return
        pairs = [
            (self._weights[index], running[2])
            for index, running in self.layers.running.items()
            # In a forward the whole of a weight is here, of which there was only a part before.
            if index in self._weights and self._weights[index].shape == running[2].shape
        ]
        if pairs and not all(torch.equal(one.to(two.device).float(), two) for one, two in pairs):
            self._judged_at = self._last
            self._judge("inside")

    def _judge(self, where: Where) -> None:
        if self.layers is None:
            return
        self.layers.close()
        exchanged, began = self._weights_now()
        if self.batches < LEAST_BATCHES and self._first is not None:
            self.result = Misfit(exchanged=exchanged, began=began, where=where)
            return
        found = self.layers.effects(self._images, self.frozen)
        beyond = {index: each for index, each in found.items() if each.beyond and index not in self.frozen}
        fitting = frozenset(index for index, each in found.items() if not each.beyond)
        replayed, changed, left_out = self._replay(beyond, list(found)) if beyond else ({}, None, "")
        self.result = Misfit(
            self._named({index: replayed[index] for index in beyond if index in replayed and replayed[index].beyond}),
            self._named({i: each for i, each in beyond.items() if i not in replayed or not replayed[i].beyond}),
            fitting,
            changed,
            left_out,
            exchanged,
            began,
            where,
        )

    def after_training(self) -> Misfit:
        """Judge weights that were put in after the last training batch, by that batch; waits for the device."""
        exchanged, began = self._weights_now()
        anchored, self._anchor = self._anchor is not None, None
        if not anchored or not exchanged or self.batches < LEAST_BATCHES:
            return Misfit(exchanged=exchanged, began=began, where="after")
        layers = enumerate(self._observer.layers)
        every = [index for index, layer in layers if index not in self.frozen and layer.tracks]
        with kept_attribute(self._observer.modules, "training"):
            self._model.eval()
            replayed, changed, left_out = self._replay(every, every)
        beyond = {index: each for index, each in replayed.items() if each.beyond and index not in self.frozen}
        fitting = frozenset(index for index, each in replayed.items() if not each.beyond)
        return Misfit(self._named(beyond), {}, fitting, changed, left_out, exchanged, began, "after")

    def _weights_now(self) -> tuple[bool, bool]:
        """Return whether the weights are others than those that were trained, and whether they have moved since
        training began."""
        if self._anchor is None:
            return False, True
        now = WeightSamples(self._model)
        exchanged = self._anchor.differ(now)
        never = exchanged and self._first is not None and not self._first.differ(now)
        return exchanged, not never

    def _named(self, effects: Mapping[int, Effect]) -> dict[str, Effect]:
        return {self._observer.layers[index].name: each for index, each in effects.items()}

    def _replay(self, wanted: Collection[int], evaluated: Sequence[int]) -> tuple[dict[int, Effect], float | None, str]:
        """Run the last training batch as the evaluation ran: the effect on each layer, the share of answers that change
        with the batch's own statistics, and why it was left out."""
        if self._call is None:
            return {}, None, "no training batch was seen"
        if self.several:
            return {}, None, "several ranks would have to run it together"
        error = "no part of the model ran all of these layers in it"
        for part in self._candidates(wanted):
            layers = EvaluatedLayers(self._observer.layers)
            try:
                with _left_as_it_was(self._model, self._observer):
                    answers = _answers(part(*self._call[1], **self._call[2]))
                    layers.close()
                    modules = [self._observer.layers[index].module for index in evaluated if index not in self.frozen]
                    with _normalising_with_batches(self._model, modules):
                        others = _answers(part(*self._call[1], **self._call[2]))
            except Exception as failure:
                error = f"{type(failure).__name__} in it"
                continue
            finally:
                layers.close()
            found = layers.effects(self._images, self.frozen)
            if set(wanted) & set(found):
                return found, _share(answers, others), ""
        return {}, None, error

    def _candidates(self, wanted: Collection[int]) -> Iterator[nn.Module]:
        """Yield the modules that may take what the model was given in training: what the evaluation called, what
        training called, the model as a whole."""
        theirs = type(self._model).forward.__module__.startswith(("torch.", "lightning.", "pytorch_lightning."))
        evaluated = self._observer.first_call
        parts = [each[0] for each in (evaluated, self._call) if each is not None]
        names = [self._observer.layers[index].name for index in wanted]
        parts.append(self._observer.modules[self._observer.names.index(_common(names))])
        whole = [] if theirs else [self._model]
        wanted_modules = {self._observer.layers[index].module for index in wanted}
        for part in dict.fromkeys([*whole, *parts] if self._observer.calls > 1 else [*parts, *whole]):
            if wanted_modules & set(part.modules()) and (part is not self._model or not theirs):
                yield part


@contextmanager
def _left_as_it_was(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Nothing that runs inside is recorded or leaves anything in buffers or generators."""
    devices = sorted({each.device.index for each in model.parameters() if each.device.type == "cuda"})
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    recording, observer.recording = observer.recording, False
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(extra_pass())
        try:
            yield
        finally:
            observer.recording = recording
            for buffer, before in kept:
                buffer.copy_(before)


@contextmanager
def _normalising_with_batches(model: nn.Module, layers: Sequence[_BatchNorm]) -> Iterator[None]:
    with paused_statistics(model), kept_attribute(layers, "training"):
        for layer in layers:
            layer.training = True
        yield


def _answers(output: Any) -> Tensor | None:
    """Return the class of each sample, or of each of its positions; for one number a sample, on which side of 0 it
    is."""
    tensor = next((each for each in tensors_in(output) if each.is_floating_point() and each.dim() > 0), None)
    if tensor is None:
        return None
    return tensor.argmax(1) if tensor.dim() > 1 and tensor.shape[1] > 1 else tensor > 0


def _share(answers: Tensor | None, others: Tensor | None) -> float | None:
    if answers is None or others is None or answers.shape != others.shape or not answers.numel():
        return None
    return (answers != others).double().mean().item()


def _weight(layer: nn.Module) -> Tensor | None:
    weight = getattr(layer, "weight", None)
    return local_value(weight).detach() if isinstance(weight, Tensor) and not weight.is_meta else None


def _noise(layer: _BatchNorm) -> float:
    rule = rule_of(layer)
    momentum, size = getattr(rule, "momentum", None), getattr(rule, "size", None)
    if momentum is not None:
        return float(momentum / (2 - momentum))
    return 1 / size if isinstance(size, int) else 0.0


def _common(names: Sequence[str]) -> str:
    """Return the name of the module that holds all layers `names` and no other does so nearer to them."""
    paths = [name.split(".")[:-1] for name in names]
    first = list(paths[0])
    while any(path[: len(first)] != first for path in paths):
        first.pop()
    return ".".join(first)
