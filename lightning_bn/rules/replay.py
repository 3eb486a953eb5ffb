"""The last training batch, run once more as an evaluation ran: do the running statistics fit it?

It is run by all ranks together or by none. Ranks meet at the end of an evaluation, where the weights may be others
again: those of the evaluation are kept until then and put in for the replay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.discovery import Modes
from lightning_bn.modes import extra_pass, kept_attribute, paused_statistics
from lightning_bn.rules.fit import Effect, EvaluatedLayers
from lightning_bn.rules.observer import Observer, nested_tensors
from lightning_bn.sharding import is_sharded

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

FEW_CHANGE = 0.1
"""Share of answers that change with the batch's own statistics, below which a misfit costs next to nothing."""

Share = Callable[[Any], list[Any]]
"""Returns what each rank has passed; every rank calls it as often."""


@dataclass(frozen=True)
class Replayed:
    """What the replay showed."""

    effects: dict[int, Effect] = field(default_factory=dict)
    """How far each layer is off, by its index; of what this rank ran."""
    beyond: frozenset[int] = frozenset()
    """Indices of the layers that are certainly off, on every rank."""
    noticeable: frozenset[int] = frozenset()
    """Indices of the layers whose effect is large enough to change answers, on every rank; of so few images it need not
    be certain, since those of the evaluation have shown it."""
    changed: float | None = None
    """Share of the answers that change with the batch's own statistics, over all ranks; None where there are none."""
    left_out: str = ""
    """Why it was left out, in words."""

    def misfits(self) -> frozenset[int]:
        """Return the layers whose statistics do not fit the training images: by what it changes, or, where no answers
        can be compared or few change, by the effect alone."""
        return self.noticeable if (self.changed or 0) > FEW_CHANGE else self.beyond


NOT_ASKED = Replayed(left_out="the other ranks were not asked")


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
    batches: int = 0
    """Training batches before it."""
    where: Where = "before"
    """Where weights were exchanged: before the evaluation; inside of its step; after the last training step."""
    copies: tuple[tuple[str, Misfit], ...] = ()
    """Of copies that the evaluation ran and that are no part of the model: the class, and what the test tells of it."""


def decided(result: Misfit, observer: Observer, noticed: Mapping[int, Effect], replayed: Replayed) -> Misfit:
    """Return `result` with what a training batch tells of the layers that were off in the evaluation."""
    misfits = {index: replayed.effects[index] for index in noticed if index in replayed.misfits()}
    only_here = {index: each for index, each in noticed.items() if each.beyond and index not in misfits}
    return replace(
        result,
        layers=named(observer, misfits),
        only_here=named(observer, only_here),
        fitting=result.fitting | (noticed.keys() - misfits.keys() - only_here.keys()),
        changed=replayed.changed,
        left_out=replayed.left_out,
    )


def named(observer: Observer, effects: Mapping[int, Effect]) -> dict[str, Effect]:
    """Return `effects` by the names of the layers."""
    return {observer.layers[index].name: each for index, each in effects.items()}


class Kept:
    """Weights, buffers and modes of a model, on the host; waits for the device."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._modes: Modes = observer.snapshot()
        self._values = [each.to("cpu", copy=True) for each in _tensors(observer.modules[0])]

    @contextmanager
    def put_in(self) -> Iterator[None]:
        """Give the model what was kept for the block, and back what it has now."""
        modes = self._observer.snapshot()
        now = zip(_tensors(self._observer.modules[0]), self._values, strict=True)
        # What is the same keeps its version, by which others see that a tensor was written.
        changed = [(tensor, value, tensor.clone()) for tensor, value in now if not torch.equal(tensor.cpu(), value)]
        try:
            self._observer.restore(self._modes)
            for tensor, value, _ in changed:
                tensor.copy_(value)
            yield
        finally:
            self._observer.restore(modes)
            for tensor, _, before in changed:
                tensor.copy_(before)


class Replay:
    """Runs the last training batch.

    Args:
        observer: knows the layers, and what they are called with.
        call: what the model was called with in it; None: no batch was seen.
        images: in a training batch, by layer.
        frozen: indices of the layers that ran in eval mode in training.
    """

    def __init__(self, observer: Observer, call: Call | None, images: dict[int, int], frozen: Collection[int]) -> None:
        self._observer, self._model = observer, observer.modules[0]
        self._call, self._images, self._frozen = call, images, frozen

    def alone(self, wanted: Collection[int], evaluated: Sequence[int]) -> Replayed:
        """Run the batch in this process.

        Args:
            wanted: indices of the layers that are to be judged.
            evaluated: of those that the evaluation ran.
        """
        return self.together(wanted, evaluated, lambda value: [value])

    def together(
        self, wanted: Collection[int], evaluated: Sequence[int], share: Share, kept: Kept | None = None
    ) -> Replayed:
        """Run the batch on all ranks, if every one of them wants it; nothing that fails on one keeps another waiting.

        Args:
            wanted: indices of the layers that are to be judged; none: this rank has no need of it.
            evaluated: of those that the evaluation ran.
            share: how the ranks tell each other.
            kept: what the model had in the evaluation.
        """
        wishes = share(sorted(wanted) if self._call is not None else [])
        agreed = set(wishes[0]).intersection(*wishes)
        if self._call is None:
            return Replayed(left_out="no training batch was seen")
        if len(wishes) > 1 and is_sharded(self._model):
            return Replayed(left_out="the weights are spread over ranks")
        if not agreed:
            return Replayed(left_out="not every rank saw a misfit")
        try:
            parts = list(self._candidates(agreed))
            plan = [self._observer.names[self._observer.modules.index(part)] for part in parts]
        except Exception as failure:  # the others are to learn of it
            parts, plan = [], [f"{type(failure).__name__} in looking for them"]
        plans = share(plan)
        if any(other != plan for other in plans):
            return Replayed(left_out="the ranks ran different parts of the model")
        error = "no part of the model ran all of these layers in it"
        for part in parts:
            own = self._attempt(part, self._call, agreed, evaluated, kept)
            runs = share(replace(own, effects={}))
            error = next((each.left_out for each in runs if each.left_out), "")
            if not error:
                known = [each.changed for each in runs if each.changed is not None]
                return Replayed(
                    own.effects,
                    frozenset.intersection(*(each.beyond for each in runs)),
                    frozenset.intersection(*(each.noticeable for each in runs)),
                    sum(known) / len(known) if known else None,
                )
        return Replayed(left_out=error)

    def _attempt(
        self, part: nn.Module, call: Call, wanted: Collection[int], evaluated: Sequence[int], kept: Kept | None
    ) -> Replayed:
        """Run the batch through one part of the model, in this process."""
        _, args, kwargs = call
        layers = EvaluatedLayers(self._observer.layers)
        try:
            with ExitStack() as stack:
                if kept is not None:
                    stack.enter_context(kept.put_in())
                stack.enter_context(_left_as_it_was(self._model, self._observer))
                answers = _answers(part(*args, **kwargs))
                layers.close()
                modules = [self._observer.layers[index].module for index in evaluated if index not in self._frozen]
                with _normalising_with_batches(self._model, modules):
                    others = _answers(part(*args, **kwargs))
            found = layers.effects(self._images, self._frozen)
            if not set(wanted) & set(found):
                return Replayed(left_out="no part of the model ran all of these layers in it")
            beyond, noticeable = (
                frozenset(index for index, each in found.items() if getattr(each, bound))
                for bound in ("beyond", "noticeable")
            )
            return Replayed(found, beyond, noticeable, _share(answers, others))
        except Exception as failure:
            return Replayed(left_out=f"{type(failure).__name__} in it")
        finally:
            layers.close()

    def _candidates(self, wanted: Collection[int]) -> Iterator[nn.Module]:
        """Yield the modules that may take what the model was given in training: what the evaluation called, what
        training called, the model as a whole."""
        evaluated = self._observer.first_call
        parts = [each[0] for each in (evaluated, self._call) if each is not None]
        names = [self._observer.layers[index].name for index in wanted]
        parts.append(self._observer.module(_common(names)))
        parts.insert(0 if self._observer.calls > 1 else len(parts), self._model)
        wanted_modules = {self._observer.layers[index].module for index in wanted}
        for part in dict.fromkeys(_unwrapped(each) for each in parts):
            if wanted_modules & set(part.modules()) and not _is_wrapper(part):
                yield part


def _tensors(model: nn.Module) -> list[Tensor]:
    return [each.detach() for each in (*model.parameters(), *model.buffers()) if not each.is_meta]


@contextmanager
def _left_as_it_was(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Nothing that runs inside is recorded or leaves anything in buffers or generators."""
    devices = sorted({each.device.index for each in model.parameters() if each.device.type == "cuda"})
    kept = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
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
                # What is the same keeps its version: a backward may be waiting for it.
                if buffer.layout != torch.strided or not torch.equal(buffer, before):
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
    tensor = next((each for each in nested_tensors(output) if each.is_floating_point() and each.dim() > 0), None)
    if tensor is None:
        return None
    return tensor.argmax(1) if tensor.dim() > 1 and tensor.shape[1] > 1 else tensor > 0


def _is_wrapper(module: nn.Module) -> bool:
    """Whether the module's forward is that of Lightning, or of a wrapper of torch's in which ranks meet."""
    theirs = ("torch.nn.parallel.", "torch.distributed.", "lightning.", "pytorch_lightning.")
    return type(module).forward.__module__.startswith(theirs)


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return what a wrapper calls with its own arguments."""
    children = list(module.children())
    return _unwrapped(children[0]) if _is_wrapper(module) and len(children) == 1 else module


def _share(answers: Tensor | None, others: Tensor | None) -> float | None:
    if answers is None or others is None or answers.shape != others.shape or not answers.numel():
        return None
    return (answers != others).double().mean().item()


def _common(names: Sequence[str]) -> str:
    """Return the name of the module that holds all layers `names` and no other does so nearer to them."""
    paths = [name.split(".")[:-1] for name in names]
    first = list(paths[0])
    while any(path[: len(first)] != first for path in paths):
        first.pop()
    return ".".join(first)
