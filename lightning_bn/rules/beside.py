"""Copies of the model that an evaluation runs and that are no part of it: held in a list, by a callback, by a library's
object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_bn.discovery import BatchNormLayer, find_batch_norms
from lightning_bn.rules.fit import EvaluatedLayers
from lightning_bn.rules.observer import Observer
from lightning_bn.rules.replay import NOT_ASKED, Call, Misfit, Replay, decided


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
            kept = {index for index, layer in enumerate(observer.layers) if _shape(layer) in spared}
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


def _shape(layer: BatchNormLayer) -> tuple[type, int]:
    return type(layer.module), layer.module.num_features


def _shapes(layers: Iterable[BatchNormLayer]) -> Counter[tuple[type, int]]:
    return Counter(map(_shape, layers))
