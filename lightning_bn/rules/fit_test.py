"""Whether running statistics fit what an evaluation normalises with them: measured on its first batches, and where they
do not, on the last training batch, run once more as the evaluation runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_bn.error_boundary import UNBOUNDED, ErrorBoundary
from lightning_bn.modes import kept_attribute
from lightning_bn.rules.batch_pattern import ForwardRecord
from lightning_bn.rules.beside import CopiesBeside
from lightning_bn.rules.fit import Effect, EvaluatedLayers, affine_weight
from lightning_bn.rules.observer import Observer
from lightning_bn.rules.replay import NOT_ASKED, Kept, Replay, Replayed, Share
from lightning_bn.rules.snapshots import WeightSamples
from lightning_bn.torch_internals import is_compiled

EVALUATED = 4
"""Batches of an evaluation that are measured."""

FEW_CHANGE = 0.1
"""Share of answers that change with the batch's own statistics, below which a misfit costs next to nothing."""

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
    batches: int = 0
    """Training batches before it."""
    where: Where = "before"
    """Where weights were exchanged: before the evaluation; inside of its step; after the last training step."""
    copies: tuple[tuple[str, Misfit], ...] = ()
    """Of copies that the evaluation ran and that are no part of the model: the class, and what the test tells of it."""


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
            self.layers = EvaluatedLayers(self._observer.layers, self._boundary)
            self._last = int(min(batches or EVALUATED, EVALUATED)) - 1
            if self.batches >= LEAST_BATCHES and not any(map(is_compiled, self._observer.modules)):
                self._beside = CopiesBeside(self._observer, self._boundary)
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

    def end_evaluation(self) -> None:
        """The evaluation has ended."""
        self.close()

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
        self.result = _decided(self.result, self._observer, noticed, replayed)

    def _judge_copies(self, beside: CopiesBeside) -> None:
        images = max(self._images.values(), default=1)
        frozen = {*self.frozen, *self._mixing}
        found = beside.judge(self._call, images, frozen, alone=self.alone and self.share is None)
        copies = [(each.name, _decided(Misfit(), each.observer, each.noticed, each.replayed)) for each in found]
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
        misfits = {index for index in _misfits(replayed) if self._may_judge(index)}
        found = _named(self._observer, {i: each for i, each in replayed.effects.items() if i in misfits})
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


def _decided(result: Misfit, observer: Observer, noticed: Mapping[int, Effect], replayed: Replayed) -> Misfit:
    """Return `result` with what a training batch tells of the layers that were off in the evaluation."""
    misfits = {index: replayed.effects[index] for index in noticed if index in _misfits(replayed)}
    only_here = {index: each for index, each in noticed.items() if each.beyond and index not in misfits}
    return replace(
        result,
        layers=_named(observer, misfits),
        only_here=_named(observer, only_here),
        fitting=result.fitting | (noticed.keys() - misfits.keys() - only_here.keys()),
        changed=replayed.changed,
        left_out=replayed.left_out,
    )


def _named(observer: Observer, effects: Mapping[int, Effect]) -> dict[str, Effect]:
    return {observer.layers[index].name: each for index, each in effects.items()}


def _misfits(replayed: Replayed) -> frozenset[int]:
    """Return the layers whose statistics do not fit the training images: by what it changes, or, where no answers can
    be compared or few change, by the effect alone."""
    return replayed.noticeable if (replayed.changed or 0) > FEW_CHANGE else replayed.beyond
