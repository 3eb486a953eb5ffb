"""Synchronised batch norm as a callback and as a plugin of Lightning's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_bn.callbacks.both_lightnings import (
    Callback,
    LightningModule,
    MisconfigurationException,
    TorchSyncBatchNorm,
    Trainer,
    callbacks_of,
)
from lightning_bn.callbacks.lightning_internals import data_parallel_group, layer_sync_of
from lightning_bn.discovery import find_batch_norms, unserved
from lightning_bn.ranks.collective import Group, Ranks
from lightning_bn.ranks.synchronization import merge_statistics, synchronise
from lightning_bn.sharding import check_each_sees_its_own, check_not_distributed


# Trainer(sync_batchnorm=True) takes no other LayerSync beside it than a TorchSyncBatchNorm.
class BatchNormSync(TorchSyncBatchNorm, Callback):  # type: ignore[misc]  # see Callback
    """Batch norm over the batches of all ranks, on any backend, without replacing a module.

    Torch's conversion makes new layers and drops subclasses, buffers, hooks and the ``training`` flag, and Lightning's
    reversal leaves another class. Here every layer stays the same object (torch's, this package's with any average, any
    subclass): in training it normalises with the mean and *biased* variance of all ranks' batches, masks and empty
    batches included, and its average takes their mean and *unbiased* variance. Cost per layer and step: one all_gather
    of ``2 C + 1`` numbers forward, one all_reduce of ``2 C`` backward.

    As a callback it works with every strategy. As a plugin it works where Lightning applies plugins of this kind, in
    DDP and in FSDP 1; elsewhere this package's callbacks stop the fit with an error. Outside a Trainer, call `apply`.

    Args:
        statistics_only: each rank normalises with its own batch, as plain DDP does, but the running statistics are the
            moments of all ranks' batches, the spread between ranks included, so that every rank evaluates with the
            same. Cost: one all_reduce for all layers together, per forward of the model, which runs while backward
            does.
        group_size: normalise in groups of that many neighbouring ranks, which must divide the number of ranks. The
            running statistics are those of all ranks; each group's batch is counted once.
        process_group: the ranks to synchronise. None: all, or under tensor parallelism those that see different data.

    Raises:
        ValueError: group_size below 2, or with statistics_only; in `apply`, a group_size that does not divide the
            number of ranks, a process group without this rank, or ranks whose models differ.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import BatchNormSync
        >>> trainer = Trainer(callbacks=[BatchNormSync()], accelerator="cpu", logger=False, enable_checkpointing=False)

    References:
        Peng et al. 2018, "MegDet: a large mini-batch object detector", section 3.3 (cross-GPU batch normalization).
    """

    __module__ = "lightning_bn"

    def __init__(
        self, *, statistics_only: bool = False, group_size: int | None = None, process_group: Any = None
    ) -> None:
        if group_size is not None and (not isinstance(group_size, int) or group_size < 2 or statistics_only):
            raise ValueError(
                f"BatchNormSync(statistics_only={statistics_only!r}, group_size={group_size!r}): group_size is a "
                "number of ranks, at least 2, that normalise with one batch, as in BatchNormSync(group_size=8); with "
                "statistics_only=True none do."
            )
        self.statistics_only = statistics_only
        self.group_size = group_size
        self.process_group = process_group
        self._undo: WeakKeyDictionary[nn.Module, list[Callable[[], None]]] = WeakKeyDictionary()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Every strategy has wrapped and sharded the module by now, and no layer is replaced afterwards.
        if not self.is_applied_to(pl_module):
            self._apply(pl_module, self.process_group or data_parallel_group(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.revert(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.revert(pl_module)

    def is_applied_to(self, model: nn.Module) -> bool:
        """Tell whether `apply` has synchronised the layers of `model`."""
        return model in self._undo

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronise every batch-norm layer of `model`, which is returned; without a process group, or alone in it, do
        nothing. One object may be applied to several models. Every rank of the group must call it."""
        self._apply(model, self.process_group)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Leave every layer of `model`, which is returned, exactly as it was before `apply`."""
        undo = self._undo.pop(model, [])
        while undo:
            undo.pop()()
        return model

    def _apply(self, model: nn.Module, group: Group) -> None:
        self.revert(model)
        ranks = Ranks(group, task="BatchNormSync.apply(model)", afterwards="No layer was changed.")
        if not ranks.are_several:
            return
        layers = find_batch_norms(model)
        if others := unserved(model):
            rank_zero_warn(f"BatchNormSync.apply(model) leaves out some norms.{others}")
        with ranks.told():
            check_not_distributed(layers, ranks.task)
            if group is None:
                check_each_sees_its_own(model, ranks.task)
            self._check_group_size(ranks.size)
        ranks.agree(
            {
                "the number of batch-norm layers": len(layers),
                "the batch-norm layers": [(layer.name, layer.module.num_features) for layer in layers],
                "statistics_only": self.statistics_only,
                "group_size": self.group_size,
            }
        )
        undo = self._undo[model] = []
        part = self._part(ranks)
        if not self.statistics_only:
            undo += [synchronise(layer.module, group if part is None else part) for layer in layers]
        if self.statistics_only or part is not None:
            undo.append(merge_statistics(model, group, counted=part is None or dist.get_rank(part) == 0))

    def _check_group_size(self, world: int) -> None:
        if self.group_size is not None and world % self.group_size:
            fitting = [size for size in range(2, world + 1) if world % size == 0]
            raise ValueError(
                f"BatchNormSync(group_size={self.group_size}): {world} ranks can't be divided into groups of "
                f"{self.group_size}; one of {', '.join(map(str, fitting))} can be used."
            )

    def _part(self, ranks: Ranks) -> Group:
        """Return the group of neighbours that this rank normalises with, None where it is that of all `ranks`."""
        if self.group_size is None or self.group_size == ranks.size:
            return None
        members = dist.get_process_group_ranks(ranks.group or dist.group.WORLD)
        first = ranks.rank // self.group_size * self.group_size
        # Made by its members alone: the ranks of another group, as there are under tensor parallelism, make their own.
        return dist.new_group(members[first : first + self.group_size], use_local_synchronization=True)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is applied to nothing, and weak references can't be pickled.
        return {name: value for name, value in vars(self).items() if name != "_undo"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _undo=WeakKeyDictionary())


def check_plugin_is_applied(trainer: Trainer, module: LightningModule) -> None:
    """Raise where `BatchNormSync` was given as a plugin under a strategy that applies none; to be called when a fit
    starts.

    Raises:
        MisconfigurationException: with the form that every strategy passes.
    """
    plugin = layer_sync_of(trainer)
    if not isinstance(plugin, BatchNormSync) or trainer.world_size < 2:
        return
    if plugin.is_applied_to(module) or plugin in callbacks_of(trainer):
        return
    raise MisconfigurationException(
        f"Trainer(plugins=[BatchNormSync(...)]): {type(trainer.strategy).__name__} applies no plugin of this kind, so "
        "no layer would be synchronised. Give it as a callback: Trainer(callbacks=[BatchNormSync(...)]), without "
        "plugins= and sync_batchnorm=."
    )
