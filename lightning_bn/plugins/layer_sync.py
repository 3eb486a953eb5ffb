"""Synchronised batch norm as a Lightning plugin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn

from lightning_bn.callbacks.both_lightnings import TorchSyncBatchNorm
from lightning_bn.discovery import find_batch_norms
from lightning_bn.ranks.synchronization import merge_statistics, synchronise

__all__ = ["BatchNormSync"]


# Trainer(sync_batchnorm=True) takes no other LayerSync beside it than a TorchSyncBatchNorm.
class BatchNormSync(TorchSyncBatchNorm):
    """Batch norm over the batches of all ranks, on any backend, without replacing a module.

    Torch's conversion makes new layers and drops subclasses, buffers, hooks and the ``training`` flag, and Lightning's
    way back leaves another class. Here every layer stays itself (torch's, this package's with any average, anybody's
    subclass): in training it normalises with the mean and *biased* variance of all ranks' batches, masks and empty
    batches included, and its average takes their mean and *unbiased* variance. Cost per layer and step: one all_gather
    of ``2 C + 1`` numbers forward, one all_reduce of ``2 C`` backward.

    Args:
        statistics_only: each rank normalises with its own batch, as plain DDP does, but the running statistics are the
            moments of all ranks' batches, the spread between ranks included, so that every rank evaluates with the
            same. Cost: one all_gather for all layers together, per forward of the model.
        process_group: the ranks to synchronise, None for all.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import BatchNormSync
        >>> trainer = Trainer(plugins=[BatchNormSync()], sync_batchnorm=True, accelerator="cpu", logger=False)

    References:
        Peng et al. 2018, "MegDet: a large mini-batch object detector", section 3.3 (cross-GPU batch normalization).
    """

    __module__ = "lightning_bn"

    def __init__(self, *, statistics_only: bool = False, process_group: Any = None) -> None:
        self.statistics_only = statistics_only
        self.process_group = process_group
        self._undo: list[Callable[[], None]] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronise every batch-norm layer of `model`, which is returned; without a process group, or alone in it, do
        nothing."""
        self.revert(model)
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1):
            return model
        if self.statistics_only:
            self._undo = [merge_statistics(model, self.process_group)]
        else:
            self._undo = [synchronise(layer.module, self.process_group) for layer in find_batch_norms(model)]
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Leave every layer of `model`, which is returned, exactly as it was before `apply`."""
        while self._undo:
            self._undo.pop()()
        return model
