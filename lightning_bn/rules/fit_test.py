"""Whether running statistics fit what an evaluation normalises with them: measured on its first batches, and where they
do not, on the last training batch, run once more as the evaluation runs. Likewise of copies of the model that an
evaluation runs and that are no part of it: held in a list, by a callback, by a library's object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_bn.discovery import BatchNormLayer, find_batch_norms
from lightning_bn.modes import kept_attribute
from lightning_bn.rules.batch_pattern import ForwardRecord
from lightning_bn.rules.fit import Effect, EvaluatedLayers, affine_weight
from lightning_bn.rules.learning import shape_of
from lightning_bn.rules.observer import Observer
from lightning_bn.rules.replay import NOT_ASKED, Call, Kept, Misfit, Replay, Replayed, Share, Where, decided, named
from lightning_bn.rules.snapshots import WeightSamples
from lightning_bn.torch_internals import is_compiled

EVALUATED = 4
"""Batches of an evaluation that are measured."""

LEAST_BATCHES = 30
"""Training batches before which nothing is judged: torch's default average has left its start by then."""


class FitTest:
    """Judges each evaluation of a model, and the end of a fit.

    A training step costs a reference to its input; an evaluation, two reductions a layer in each of its first batches;
    one whose statistics do not fit, two forwards of a training batch.

    Args:
        observer: knows the layers, and what they are called with; its boundary stands around every hook.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._model = observer.modules[0]
        self.batches = 0
        self._images: dict[int, int] = {}
        self._mixing: set[int] = set()  # layers that average several inputs of a batch, as of real and generated images
        self._most = 0  # samples in the largest batch of this epoch
        self._known: list[ForwardRecord] = []
        self._call: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None
        self._first: WeightSamples | None = None
        self._anchor: WeightSamples | None = None
        self.layers: EvaluatedLayers | None = None
        self._beside: CopiesBeside | None = None
        self._weights: dict[int, Tensor] = {}
        self._is_judged = False  # it is once, by the first of several loaders
        self._last = 0
        self.frozen: Collection[int] = ()
        """Indices of the layers that ran in eval mode in training: for them nothing is told."""
        self.share: Share | None = None
        """How the ranks meet, once in `settle` and once in `after_training`; None where there are no others."""
        self.alone = True
        """Whether, without `share`, a training batch may be run: where there are other ranks they would be waited
        for."""
        self._pending: tuple[dict[int, Effect], list[int], Kept] | None = None
        self.result = Misfit()
        """Of the latest evaluation."""

    def begin_epoch(self) -> None:
        """A training epoch begins: its largest batch, the last of several, is the one that may be run again."""
        self._most = 0

    def begin_training(self) -> None:
        """A training batch begins: of the first, the weights are kept."""
        self.close()  # an evaluation that raised has no end
        if self._first is None:
            self._first = WeightSamples(self._model)

    def end_training_batch(self, forwards: list[ForwardRecord]) -> None:
        """A training batch has ended."""
        self.batches += 1
        # Not the last batch of an epoch, where it is a small one: few answers tell little.
        if self._observer.first_samples >= self._most:
            self._most, self._call = self._observer.first_samples, self._observer.first_call
        if forwards is not self._known:
            self._known = forwards
            calls: dict[int, int] = {}
            for each in forwards:
                self._images[each.layer] = max(each.samples, self._images.get(each.layer, 1))
                if each.moved and calls.setdefault(each.layer, each.call) != each.call:
                    self._mixing.add(each.layer)

    def anchor(self) -> None:
        """The weights are those that training has left."""
        self._anchor = WeightSamples(self._model) if self.batches else None

    def begin_evaluation(self) -> None:
        """An evaluation begins."""
        self.close()
        self.result = Misfit()
        self.layers = self._pending = None
        self._is_judged = False

    def begin_batch(self, index: int, batches: float | None) -> None:
        """Batch number `index` of `batches` of the evaluation begins."""
        if index == 0 and self.layers is None and not is_compiled(self._model):  # a hook would compile it anew
            self.layers = EvaluatedLayers(self._observer.layers, self._observer.boundary)
            self._last = int(min(batches or EVALUATED, EVALUATED)) - 1
            if self.batches >= LEAST_BATCHES and not any(map(is_compiled, self._observer.modules)):
                self._beside = CopiesBeside(self._observer)
        if self.layers is not None and index == self._last and not self._is_judged:
            modules = enumerate(self._observer.layers)
            self._weights = {
                i: weight.clone() for i, each in modules if (weight := affine_weight(each.module)) is not None
            }
            self._observer.on_leave = self._left

    def end_batch(self, index: int) -> None:
        """Batch number `index` of the evaluation has ended."""
        self._observer.on_leave = None
        if self.layers is not None and index == self._last and not self._is_judged:
            self._judge("before")
        if self._beside is not None:
            self._beside.found_all()
            if index == self._last:
                self._judge_copies(self._beside)
                self._beside = None

    def close(self) -> None:
        """Remove the hooks."""
        self._observer.on_leave = None
        for each in (self.layers, self._beside):
            if each is not None:
                each.close()
        self._beside = None

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
            self._judge("inside")

    def _judge(self, where: Where) -> None:
        if self.layers is None:
            return
        self._is_judged = True
        self.layers.close()
        exchanged, began = self._weights_now()
        self.result = Misfit(exchanged=exchanged, began=began, batches=self.batches, where=where)
        if 0 < self.batches < LEAST_BATCHES:
            return
        found = self.layers.effects(self._images, self.frozen)
        noticed = {index: each for index, each in found.items() if each.noticed and self._may_judge(index)}
        self.result = replace(self.result, fitting=frozenset(found) - noticed.keys())
        if noticed and self.share is not None:
            self._pending = (noticed, list(found), Kept(self._observer))
        elif noticed:
            self._take(noticed, self._replay().alone(noticed, list(found)) if self.alone else NOT_ASKED)

    def settle(self) -> None:
        """The evaluation is over on all ranks: what its first batches left open is decided by all of them."""
        if self.share is not None:
            noticed, evaluated, kept = self._pending or ({}, [], None)
            replayed = self._replay().together(noticed, evaluated, self.share, kept)
            self._pending = None
            if noticed:
                self._take(noticed, replayed)

    def _take(self, noticed: Mapping[int, Effect], replayed: Replayed) -> None:
        self.result = decided(self.result, self._observer, noticed, replayed)

    def _judge_copies(self, beside: CopiesBeside) -> None:
        images, frozen = max(self._images.values(), default=1), {*self.frozen, *self._mixing}
        copies = beside.judge(self._call, images, frozen, alone=self.alone and self.share is None)
        self.result = replace(self.result, copies=tuple(copies))

    def after_training(self) -> Misfit:
        """Judge weights that were put in after the last training batch, by that batch; waits for the device."""
        exchanged, began = self._weights_now()
        anchored, self._anchor = self._anchor is not None, None
        every: list[int] = []
        if anchored and exchanged and self.batches >= LEAST_BATCHES:
            every = [i for i, layer in enumerate(self._observer.layers) if layer.tracks and self._may_judge(i)]
        elif self.share is None:
            return Misfit(exchanged=exchanged, began=began, batches=self.batches, where="after")
        with kept_attribute(self._observer.modules, "training"):
            self._model.eval()
            replayed = self._replay().together(every, every, self.share or (lambda value: [value]))
        misfits = {index for index in replayed.misfits() if self._may_judge(index)}
        found = named(self._observer, {i: each for i, each in replayed.effects.items() if i in misfits})
        fitting = frozenset(replayed.effects) - misfits
        return Misfit(found, {}, fitting, replayed.changed, replayed.left_out, exchanged, began, self.batches, "after")

    def _replay(self) -> Replay:
        return Replay(self._observer, self._call, self._images, {*self.frozen, *self._mixing})

    def _may_judge(self, index: int) -> bool:
        """Whether one input of a training batch shows what the layer's statistics are of."""
        return index not in self._mixing and index not in self.frozen

    def _weights_now(self) -> tuple[bool, bool]:
        """Return whether the weights are others than those that were trained, and whether they have moved since
        training began."""
        if self._anchor is None:
            return False, True
        now = WeightSamples(self._model)
        exchanged = self._anchor.differ(now)
        never = exchanged and self._first is not None and not self._first.differ(now)
        return exchanged, not never


class CopiesBeside:
    """Looks, in the first batch of an evaluation, for modules whose batch norms are like some of the model's, and
    measures what these get until `judge`. Nothing waits for the device before.

    Args:
        observer: knows what belongs to the model; its boundary stands around every hook.
    """

    def __init__(self, observer: Observer) -> None:
        self._boundary = observer.boundary
        self._layers = observer.layers
        self._own = frozenset(observer.modules)
        self._seen = set(self._own)
        self._like = _shapes(observer.layers)
        self._found: list[tuple[nn.Module, EvaluatedLayers]] = []
        # The only hook that sees what nobody has told of; all modules have it, for the length of one batch.
        self._everywhere: RemovableHandle | None = register_module_forward_pre_hook(observer.boundary.guard(self._see))

    def found_all(self) -> None:
        """The first batch has ended."""
        if self._everywhere is not None:
            self._everywhere.remove()
            self._everywhere = None

    def close(self) -> None:
        """Remove the hooks."""
        self.found_all()
        for _, layers in self._found:
            layers.close()

    def judge(
        self, call: Call | None, images: int, frozen: Collection[int], *, alone: bool
    ) -> list[tuple[str, Misfit]]:
        """Return the class of each copy with statistics that do not fit the evaluation, and what is wrong with them;
        waits for the device.

        Args:
            call: what the model was called with in the last training batch, which is run through the copy.
            images: in a training batch.
            frozen: indices of the model's layers of which nothing is told; nor is it of a copy's that are like them.
            alone: whether this process may run it: where there are other ranks they would be waited for.
        """
        self.close()
        spared = _shapes(self._layers[index] for index in frozen)
        found = []
        for copy, layers in self._found:
            observer = Observer(copy)
            sizes = dict.fromkeys(range(len(observer.layers)), images)
            kept = {index for index, layer in enumerate(observer.layers) if shape_of(layer) in spared}
            effects = layers.effects(sizes, kept)
            noticed = {index: each for index, each in effects.items() if each.noticed and index not in kept}
            if noticed:
                replayed = Replay(observer, call, sizes, kept).alone(noticed, list(effects)) if alone else NOT_ASKED
                found.append((type(copy).__name__, decided(Misfit(), observer, noticed, replayed)))
        return found

    def _see(self, module: nn.Module, args: Any) -> None:
        if module in self._seen or torch.compiler.is_compiling():
            return
        parts = set(module.modules())
        if parts & self._own:
            return  # it wraps the model
        self._seen |= parts  # what a copy calls is a part of it
        layers = find_batch_norms(module)
        if layers and _shapes(layers) <= self._like:
            self._found.append((module, EvaluatedLayers(layers, self._boundary)))


def _shapes(layers: Iterable[BatchNormLayer]) -> Counter[tuple[type, int]]:
    return Counter(map(shape_of, layers))
