"""ConvertBatchNorm: give every batch norm of an unmodified model an averaging."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_bn.averaging import Averaging, check_averaging
from lightning_bn.callbacks.both_lightnings import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    is_overridden,
)
from lightning_bn.callbacks.synchronisation import check_plugin_is_applied
from lightning_bn.discovery import find_batch_norms, unserved
from lightning_bn.layers.batch_norm import AveragedBatchNorm
from lightning_bn.layers.conversion import convert_batch_norm
from lightning_bn.layers.subclasses import has_attached_averaging


class ConvertBatchNorm(Callback):
    """Give every batch-norm layer of the model the averaging, by `convert_batch_norm`, without a change to the model's
    code.

    The layers are converted in place, before a checkpoint is loaded and before the optimizer is built: a checkpoint
    that was written under this callback contains the average's history, and a plain one loads too. A layer that already
    has this averaging is left alone, so a second or resumed fit continues with the history of the first.

    Args:
        averaging: what `convert_batch_norm` takes; each layer keeps its own copy.

    Raises:
        TypeError: averaging is not an `Averaging`; when a run starts, a layer is not supported.
        MisconfigurationException: when a run starts, the model has no batch norm; or ``Trainer(sync_batchnorm=True)``
            has put torch's layers in the place of the converted ones.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import ConvertBatchNorm, Window
        >>> trainer = Trainer(callbacks=[ConvertBatchNorm(Window(20))], logger=False, enable_checkpointing=False)
    """

    __module__ = "lightning_bn"

    def __init__(self, averaging: Averaging) -> None:
        check_averaging(averaging, f"ConvertBatchNorm({averaging!r})")
        self.averaging = averaging
        self._before_load: RemovableHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()
        if is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module):
            # What those two build comes after this hook and before the checkpoint, and no callback is called in
            # between.
            self._before_load = pl_module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
                lambda module, *_: self._convert(module)
            )
        elif not find_batch_norms(pl_module):
            raise MisconfigurationException(_nothing_to_convert(pl_module))
        self._convert(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()
        check_plugin_is_applied(trainer, pl_module)
        layers = find_batch_norms(pl_module)
        if not layers:
            raise MisconfigurationException(_nothing_to_convert(pl_module))
        lost = [layer.name for layer in layers if layer.synced and not self._has_averaging(layer.module)]
        if lost:
            raise MisconfigurationException(
                f"ConvertBatchNorm({self.averaging!r}): Trainer(sync_batchnorm=True) has put torch's SyncBatchNorm in "
                "the place of "
                f"{len(lost)} converted layers ({', '.join(lost[:3])}{', ...' * (len(lost) > 3)}), and their averages "
                "are gone. Use Trainer(sync_batchnorm=True, plugins=[lightning_bn.BatchNormSync()]), which replaces no "
                "layer."
            )
        self._convert(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _convert(self, module: nn.Module) -> None:
        waiting = [layer.module for layer in find_batch_norms(module) if not self._has_averaging(layer.module)]
        if not waiting:
            return
        try:
            convert_batch_norm(nn.ModuleList(waiting), self.averaging)
        except TypeError:
            convert_batch_norm(module, self.averaging)  # raises too, and names the layers as the model does
            raise

    def _has_averaging(self, layer: _BatchNorm) -> bool:
        # A SyncBatchNorm that torch has put in a converted layer's place holds its averaging too, as a child that
        # nothing calls.
        works = isinstance(layer, AveragedBatchNorm) or has_attached_averaging(layer)
        present = getattr(layer, "averaging", None) if works else None
        return type(present) is type(self.averaging) and _settings(present) == _settings(self.averaging)

    def _release(self) -> None:
        if self._before_load is not None:
            self._before_load.remove()
            self._before_load = None


def _settings(averaging: Averaging) -> dict[str, Any]:
    """What the averaging was built with: its public attributes, without the history."""
    return {
        name: value
        for name, value in vars(averaging).items()
        if name != "training" and not name.startswith("_") and not isinstance(value, Tensor)
    }


def _nothing_to_convert(module: LightningModule) -> str:
    return (
        f"ConvertBatchNorm: {type(module).__name__} has no batch-norm layer. Leave the callback out of "
        f"Trainer(callbacks=...).{unserved(module, constant=True)}"
    )
