"""Whether batches come sorted: they differ more from each other than random samples do, and in two epochs alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_bn.discovery import BatchNormLayer
from lightning_bn.layers.settlement import rule_of

__all__ = ["BatchOrder"]

MOST_BATCHES = 64
"""Batches of an epoch that are kept; of a longer one every second, every fourth and so on."""

LEAST_BATCHES = 24


_State = tuple[Tensor, Tensor, Tensor]  # running mean, running variance, batches counted


class BatchOrder:
    """The batch means of the first batch norm, over the first batches of two epochs, read from its buffers.

    Args:
        layers: the model's batch-norm layers; the first one that keeps statistics is looked at.
    """

    def __init__(self, layers: Sequence[BatchNormLayer]) -> None:
        self.layer = next((layer for layer in layers if layer.tracks), None)
        self.done = self.layer is None
        self._epochs: list[list[tuple[_State, _State]]] = []
        self._opened: _State | None = None
        self._index, self._stride = 0, 1

    def begin_epoch(self) -> None:
        """A training epoch begins."""
        if not self.done:
            self._epochs = [*self._epochs[-1:], []]
            self._index, self._stride = 0, 1

    def begin(self) -> None:
        """A training batch begins; like `end`, two copies of vectors on the device."""
        wanted = not self.done and self._epochs and self._index % self._stride == 0
        self._opened = self._state() if wanted else None
        self._index += 1

    def end(self) -> None:
        """A training batch has ended."""
        before, self._opened = self._opened, None
        after = self._state() if before is not None else None
        if before is None or after is None:
            return
        kept = self._epochs[-1]
        kept.append((before, after))
        if len(kept) > MOST_BATCHES:
            del kept[1::2]
            self._stride *= 2

    def _state(self) -> _State | None:
        module = self.layer.module if self.layer is not None else None
        if (
            module is None
            or module.running_mean is None
            or module.running_mean.is_meta
            or module.num_batches_tracked is None
        ):
            return None
        return module.running_mean.clone(), module.running_var.clone(), module.num_batches_tracked.clone()

    def likeness(self) -> float | None:
        """Return how alike a batch of one epoch and the *next* batch of the other are: a correlation of batch means;
        waits for the device.

        None where nothing can be said. It is 0 for shuffled data, which come in another order, and for data that lie in
        no order, whose neighbours have nothing in common. Weights that move give a straight line over both epochs,
        which is taken out.
        """
        if self.done or self.layer is None or len(self._epochs) < 2:
            return None
        batches = [self._batches(epoch) for epoch in self._epochs]
        length = min(len(each[0]) for each in batches)
        if length < LEAST_BATCHES:
            return None
        self.done = True
        both = _detrended(torch.cat([means[:length] for means, _ in batches]))
        first, second = (half - half.mean(0) for half in both.split(length))
        return float((first[:-1] * second[1:]).sum() / (first[:-1].norm() * second[1:].norm()))

    def _batches(self, epoch: list[tuple[_State, _State]]) -> tuple[Tensor, Tensor]:
        """Return mean and unbiased variance of each batch, (batches, C), from how the buffers moved."""
        means, variances = [], []
        for (old_mean, old_var, before), (mean, var, count) in epoch:
            updates = count - before
            weight = rule_of(self.layer.module).newest_weight(count, updates) if int(updates) == 1 else None
            if weight is not None and weight > 0:
                means.append((old_mean + (mean - old_mean) / weight).double().cpu())
                variances.append((old_var + (var - old_var) / weight).double().cpu())
        if not means:
            return torch.zeros(0, 1), torch.zeros(0, 1)
        return torch.stack(means), torch.stack(variances)


def _detrended(values: Tensor) -> Tensor:
    """Return what is left of each column of `values`, (batches, C), without its straight line."""
    time = torch.arange(len(values), dtype=values.dtype)
    basis = torch.stack((torch.ones_like(time), time - time.mean()), 1)
    basis = basis / basis.norm(dim=0)
    left: Tensor = values - basis @ (basis.T @ values)
    return left
