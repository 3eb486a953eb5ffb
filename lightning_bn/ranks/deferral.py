"""Running statistics of all ranks' batches, where each rank normalises with its own: one collective per forward of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging import Averaging, Batch
from lightning_bn.discovery import find_batch_norms
from lightning_bn.layers.batch_norm import AveragedBatchNorm
from lightning_bn.layers.settlement import DEFERRED, advance, is_finite
from lightning_bn.layers.subclasses import is_served, observe
from lightning_bn.moments import Moments
from lightning_bn.ranks.synchronization import Group, merge_over_ranks

__all__ = ["merge_statistics"]


class _Deferred:
    """The batches that the layers of one model have seen in this forward, in the order of the calls."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.batches: list[tuple[_BatchNorm, Averaging, Batch]] = []
        self.depth = 0  # a LightningModule's training_step is its forward to DDP, and may call its forward

    @torch.no_grad()
    def flush(self, *_: Any) -> None:
        """At the end of the outermost forward, merge every batch with the other ranks' and hand it to its layer's averaging."""
        if self.depth > 1:
            return
        taken, self.batches[:] = list(self.batches), []
        if not taken:
            return
        parts = [Moments.from_variance(batch.count, batch.mean, batch.var) for _, _, batch in taken]
        for (layer, averaging, batch), moments in zip(taken, merge_over_ranks(parts, self.group), strict=True):
            # Here, not in the forward: a layer that ran twice has counted its first batch by now.
            advance(layer, averaging, _merged(layer, moments, batch), now=True)

    def enter(self, *_: Any) -> None:
        """Begin a forward. What one that failed has left is forgotten: the other ranks' part of it may not exist."""
        if self.depth == 0:
            self.batches.clear()
        self.depth += 1

    def leave(self, *_: Any) -> None:
        self.depth -= 1


def _merged(layer: _BatchNorm, moments: Moments, own: Batch) -> Batch:
    dtype = own.mean.dtype
    var = moments.variance(unbiased=True).to(dtype)
    valid: Tensor | None = is_finite(var) if own.valid is not None else None
    return Batch(moments.mean.to(dtype), var, moments.count.reshape(()).to(dtype), layer.num_batches_tracked + 1, valid)


def merge_statistics(model: nn.Module, group: Group = None) -> Callable[[], None]:
    """Let each rank normalise with its own batch, and every rank's running statistics be those of the batches of all.

    A step's batches are merged at the end of the forward of `model`, by count, with Chan's formula: the running variance has the
    *unbiased* variance of the ranks' batches taken together, the spread between the ranks included.

    Args:
        model: its forward is the unit after which ranks meet, so it must be what every rank calls equally often.
        group: the process group, None for the default one.

    Returns:
        A function that leaves the model as it was.
    """
    deferred = _Deferred(group)
    layers = [layer.module for layer in find_batch_norms(model) if layer.module.running_mean is not None]
    ends: list[Callable[[], None]] = []
    for layer in layers:
        if not isinstance(layer, AveragedBatchNorm) and not is_served(layer):
            ends.append(observe(layer))
        layer.__dict__[DEFERRED] = deferred.batches
    handles = [
        model.register_forward_pre_hook(deferred.enter),
        model.register_forward_hook(deferred.flush),
        model.register_forward_hook(deferred.leave, always_call=True),
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for layer in layers:
            del layer.__dict__[DEFERRED]
        for end in ends:
            end()

    return undo
