"""Statistics that move while no batch runs, seen by the versions of buffers, which the host keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_bn.discovery import BatchNormLayer

__all__ = ["Boundaries"]


class Boundaries:
    """Compares the buffers at the end of a batch, or of an evaluation, with those at the next beginning.

    A forward counts its batch. So does whoever copies a state in, such as a checkpoint or averaged weights; that also
    writes the mean where autograd sees it, which torch's kernel does not. The layers of this package write both, and
    then the count itself must have risen.

    Args:
        layers: the model's batch-norm layers.
    """

    def __init__(self, layers: Sequence[BatchNormLayer]) -> None:
        self._layers = layers
        self._left: list[tuple[int, int, int]] | None = None
        self._own = [
            index
            for index, layer in enumerate(layers)
            if getattr(layer.module, "averaging", None) is not None and layer.tracks
        ]
        self._counts: Tensor | None = None

    def leave(self) -> None:
        """A batch or an evaluation ends."""
        self._left = [_state(layer) for layer in self._layers]
        self._counts = self._count() if self._own else None

    def forget(self) -> None:
        """What comes next is not compared with what came before."""
        self._left = None

    def untouched(self, index: int) -> bool:
        """Whether nobody has written a layer's mean since `leave`."""
        return self._left is not None and self._left[index][1:] == _state(self._layers[index])[1:]

    def back(self) -> list[int]:
        """The next batch or evaluation begins: return the indices of the layers that a forward moved since `leave`."""
        left, self._left = self._left, None
        if left is None:
            return []
        now = [_state(layer) for layer in self._layers]
        return [
            index
            for index in range(len(now))
            if now[index][0] != left[index][0] and self._by_forward(index, left[index], now[index])
        ]

    def _by_forward(self, index: int, left: tuple[int, int, int], now: tuple[int, int, int]) -> bool:
        if left[2] != now[2]:
            return False  # another tensor
        if index not in self._own or self._counts is None:
            return left[1] == now[1]
        place = self._own.index(index)
        return bool((self._count()[place] > self._counts.to(self._count().device)[place]).item())

    def _count(self) -> Tensor:
        """The batches counted by the layers of this package: does not wait for the device."""
        counts = [self._layers[index].module.num_batches_tracked for index in self._own]
        return torch.stack([count.to(counts[0].device) for count in counts])


def _state(layer: BatchNormLayer) -> tuple[int, int, int]:
    """How often count and mean were written, and which tensor the mean is."""
    module = layer.module
    return _version(module.num_batches_tracked), _version(module.running_mean), id(module.running_mean)


def _version(tensor: torch.Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version
