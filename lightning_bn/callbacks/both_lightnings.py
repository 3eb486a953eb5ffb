"""The one place that knows both Lightning packages.

``lightning`` installs ``pytorch_lightning`` too, and the two hold the same classes twice over: ``isinstance`` against
the class of one is False for an object of the other. So each name here is a union of both, or a class that inherits
from both. A Trainer of either package then takes the callbacks and plugins of this package, and they know its modules,
loggers and callbacks. The second import costs a fortieth of the first, since most of what they import is shared.
"""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any, TypeAlias

import lightning.pytorch
import lightning_utilities.core.rank_zero
import pytorch_lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException as _Misconfiguration
from lightning.fabric.utilities.warnings import PossibleUserWarning as _PossibleUserWarning
from lightning.pytorch import strategies as _strategies
from lightning.pytorch.callbacks import BaseFinetuning as _BaseFinetuning
from lightning.pytorch.callbacks import Checkpoint as _Checkpoint
from lightning.pytorch.callbacks import ModelCheckpoint as _ModelCheckpoint
from lightning.pytorch.callbacks import StochasticWeightAveraging as _StochasticWeightAveraging
from lightning.pytorch.callbacks import WeightAveraging as _WeightAveraging
from lightning.pytorch.loggers import Logger as _Logger
from lightning.pytorch.loggers import TensorBoardLogger as _TensorBoardLogger
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm as _TorchSyncBatchNorm
from lightning.pytorch.utilities import CombinedLoader as _CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden as _is_overridden
from lightning_fabric.utilities.exceptions import MisconfigurationException as _OtherMisconfiguration
from lightning_fabric.utilities.warnings import PossibleUserWarning as _OtherPossibleUserWarning
from pytorch_lightning import callbacks as _callbacks
from pytorch_lightning import loggers as _loggers
from pytorch_lightning import strategies as _other_strategies
from pytorch_lightning.plugins import layer_sync as _layer_sync
from pytorch_lightning.utilities import CombinedLoader as _OtherCombinedLoader

from lightning_bn.callbacks import LOG_BEFORE
from lightning_bn.callbacks.arguments import ShowsArguments

lightning_utilities.core.rank_zero.log = LOG_BEFORE or logging.getLogger("lightning.pytorch.utilities.rank_zero")

Trainer: TypeAlias = lightning.pytorch.Trainer | pytorch_lightning.Trainer
LightningModule: TypeAlias = lightning.pytorch.LightningModule | pytorch_lightning.LightningModule
Logger: TypeAlias = _Logger | _loggers.Logger
TensorBoardLogger: TypeAlias = _TensorBoardLogger | _loggers.TensorBoardLogger
CombinedLoader: TypeAlias = _CombinedLoader | _OtherCombinedLoader
BaseFinetuning: TypeAlias = _BaseFinetuning | _callbacks.BaseFinetuning
Checkpoint: TypeAlias = _Checkpoint | _callbacks.Checkpoint
ModelCheckpoint: TypeAlias = _ModelCheckpoint | _callbacks.ModelCheckpoint
ModelParallelStrategy: TypeAlias = _strategies.ModelParallelStrategy | _other_strategies.ModelParallelStrategy
ShardingStrategy: TypeAlias = (
    ModelParallelStrategy
    | _strategies.FSDPStrategy
    | _other_strategies.FSDPStrategy
    | _strategies.DeepSpeedStrategy
    | _other_strategies.DeepSpeedStrategy
)
StochasticWeightAveraging: TypeAlias = _StochasticWeightAveraging | _callbacks.StochasticWeightAveraging
WeightAveraging: TypeAlias = _WeightAveraging | _callbacks.WeightAveraging

# What each package raises for a wrong set-up, and warns of where training could be faster.
LIGHTNING_ERRORS = (_Misconfiguration, _OtherMisconfiguration)
LIGHTNING_ADVICE = (_PossibleUserWarning, _OtherPossibleUserWarning)


# The hooks of the two bases differ in the package of the Trainer that they are given, and in nothing else.
class Callback(ShowsArguments, lightning.pytorch.Callback, pytorch_lightning.Callback):  # type: ignore[misc]
    """A callback for a Trainer of either package."""


class TorchSyncBatchNorm(ShowsArguments, _TorchSyncBatchNorm, _layer_sync.TorchSyncBatchNorm):
    """A plugin for ``Trainer(sync_batchnorm=True)`` of either package, which accepts its own `TorchSyncBatchNorm`
    alone."""


class MisconfigurationException(_Misconfiguration, _OtherMisconfiguration):
    """An error that is caught by the name it has in either package."""


def package_of(owner: Trainer | LightningModule) -> ModuleType:
    """Return the package that the object's class is from: ``lightning.pytorch`` or ``pytorch_lightning``."""
    ours = isinstance(owner, (lightning.pytorch.Trainer, lightning.pytorch.LightningModule))
    return lightning.pytorch if ours else pytorch_lightning


def callbacks_of(trainer: Any) -> list[Callback]:
    """Return ``trainer.callbacks``. Lightning assigns it from another class, so no type checker knows of it."""
    return list(trainer.callbacks)


def set_callbacks(trainer: Any, callbacks: list[Callback]) -> None:
    """Assign ``trainer.callbacks``: a new list, since Lightning may be iterating over the old one."""
    trainer.callbacks = callbacks


def logging_interval(trainer: Any) -> int:
    """Return ``trainer.log_every_n_steps``, 0 for never; assigned as the callbacks are."""
    return int(trainer.log_every_n_steps or 0)


def evaluated_batches(trainer: Trainer) -> list[int | float]:
    """Return how many batches each loader of the evaluation that is under way has; infinity where nobody knows."""
    numbers = {
        "validate": trainer.num_val_batches,
        "sanity_check": trainer.num_sanity_val_batches,
        "test": trainer.num_test_batches,
        "predict": trainer.num_predict_batches,
    }
    return list(numbers.get(evaluation_stage(trainer), []))


def evaluation_stage(trainer: Trainer) -> str:
    """Return "validate", "sanity_check", "test" or "predict", or "evaluation" where the Trainer says nothing."""
    stage = trainer.state.stage
    return "evaluation" if stage is None else str(stage.value)


def is_overridden(name: str, module: LightningModule) -> bool:
    """Tell whether the module has a method of that name of its own."""
    return bool(_is_overridden(name, module, package_of(module).LightningModule))


def take_turn_after_weight_averaging(trainer: Trainer, callback: Callback) -> None:
    """Move `callback` behind the last callback that puts averaged weights in, if it stands before it; to be called from
    `setup`.

    The hooks of one event run in the order of ``trainer.callbacks``, and Lightning itself keeps `ModelCheckpoint` last.
    A callback that must see the averaged weights therefore needs no more than this one move; among all others it stays
    where the user put it.
    """
    order = callbacks_of(trainer)
    averaging = [
        place for place, other in enumerate(order) if isinstance(other, (WeightAveraging, StochasticWeightAveraging))
    ]
    if callback not in order or not averaging or order.index(callback) > averaging[-1]:
        return
    # Inserted before it is removed, so that the place is counted in the order as it was.
    order.insert(averaging[-1] + 1, callback)
    order.remove(callback)
    set_callbacks(trainer, order)
