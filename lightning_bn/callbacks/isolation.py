"""Context managers in which a LightningModule's own code may run once more, and leave no trace in its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.trainer.states import RunningStage

from lightning_bn.callbacks.both_lightnings import CombinedLoader, LightningModule, Trainer, package_of
from lightning_bn.recalibration.kept_objects import kept, kept_sources
from lightning_bn.recalibration.random_states import kept_random_states


@contextmanager
def isolated(module: LightningModule, loader: Any = None) -> Iterator[None]:
    """Let the module's steps run without grad and leave the RNG, the optimizers and their schedulers as they are.

    What they write into the module itself is undone by `recalibration.kept_objects.kept`, around each stretch that runs
    it: whoever recalibrates inside wants the new statistics to stay.

    Args:
        module: in a fit.
        loader: a loader that is iterated inside; what a running copy shares with it, generators, samplers and the
            dataset, is as before at exit, and so are the attributes of the Trainer's datamodule.
    """
    trainer = module.trainer
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    with (
        kept_random_states(loader),
        kept_sources(*(loader.flattened if isinstance(loader, CombinedLoader) else [loader]), _attributes(trainer)),
        # Lightning validates in inference mode, whose tensors could not be written into again outside it.
        torch.inference_mode(False),
        torch.no_grad(),
        kept(optimizers=trainer.optimizers, schedulers=schedulers),
    ):
        yield


@contextmanager
def muted(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Let ``self.log``, ``self.log_dict``, ``self.print`` and ``self.logger`` of the module go nowhere."""
    loggers = trainer.loggers
    with ExitStack() as stack:
        for part in _lightning_modules(module):
            stack.enter_context(_replaced(vars(part), dict.fromkeys(("log", "log_dict", "print"), _nothing)))
        stop = trainer.should_stop
        trainer.loggers = [package_of(trainer).loggers.logger.DummyLogger() for _ in loggers]
        try:
            yield
        finally:
            trainer.loggers, trainer.should_stop = loggers, stop


@contextmanager
def in_stage(trainer: Trainer, stage: RunningStage) -> Iterator[None]:
    """Let ``trainer.training`` and its like answer for `stage`: batch transfer hooks ask them whether to augment."""
    before = trainer.state.stage
    trainer.state.stage = stage
    try:
        yield
    finally:
        trainer.state.stage = before


@contextmanager
def _replaced(namespace: dict[str, Any], values: dict[str, Any]) -> Iterator[None]:
    before = {name: namespace[name] for name in values if name in namespace}
    namespace.update(values)
    try:
        yield
    finally:
        for name in values:
            namespace.pop(name, None)
        namespace.update(before)


def _lightning_modules(module: LightningModule) -> list[LightningModule]:
    return [part for part in module.modules() if isinstance(part, LightningModule)]


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Take whatever a logging method takes."""


def _attributes(trainer: Trainer) -> dict[str, Any]:
    """Those of the datamodule, whose transfer hooks see each batch."""
    datamodule = getattr(trainer, "datamodule", None)
    return {} if datamodule is None else vars(datamodule)
