"""Whether a plugin that is to synchronise batch norms does so."""

from __future__ import annotations

from lightning_bn.callbacks.both_lightnings import LightningModule, MisconfigurationException, Trainer, callbacks_of
from lightning_bn.callbacks.lightning_internals import layer_sync_of
from lightning_bn.plugins.layer_sync import BatchNormSync

__all__ = ["check_plugin_is_applied"]


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
