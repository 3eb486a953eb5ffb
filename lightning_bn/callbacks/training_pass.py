"""One more pass over the training data, or the validation data, in the middle of a fit that knows nothing of it: a
LightningModule's own code runs once more, and leaves no trace in its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_bn.callbacks.batch_input import SizedBatches
from lightning_bn.callbacks.both_lightnings import CombinedLoader, LightningModule, Trainer, package_of
from lightning_bn.callbacks.lightning_internals import (
    afresh,
    batch_to_device,
    exchanged,
    nothing,
    training_loader,
    validation_loader,
    validation_metrics,
)
from lightning_bn.modes import eager, extra_pass, kept_attribute
from lightning_bn.recalibration.kept_objects import kept, kept_sources
from lightning_bn.recalibration.random_states import kept_random_states


@contextmanager
def quiet(trainer: Trainer, module: LightningModule, loader: Any = None) -> Iterator[None]:
    """Let the module run as in training, but without grad, a trace or a log entry, and uncompiled."""
    with (
        extra_pass(),
        isolated(module, loader),
        muted(trainer, module),
        in_stage(trainer, RunningStage.TRAINING),
        eager(module),
    ):
        yield


@contextmanager
def training_pass(trainer: Trainer, module: LightningModule, dataloader: Any = None) -> Iterator[Iterator[Any]]:
    """Yield an iterator over the training batches, on the module's device, and let the module run quietly meanwhile.

    Args:
        trainer: in a fit.
        module: its LightningModule.
        dataloader: another source of batches; None takes the Trainer's own, with its samplers and
            ``limit_train_batches``.
    """
    loader = training_loader(trainer) if dataloader is None else afresh(dataloader)
    with ExitStack() as stack:
        stack.enter_context(quiet(trainer, module, loader))
        if isinstance(loader, CombinedLoader):
            stack.callback(loader.reset)  # ends the workers
        # No batch is fetched before the first is asked for.
        batches = (batch_to_device(trainer, module, batch) for batch in _batches(loader))
        yield SizedBatches(batches, loader)


def validate_once_more(trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
    """Return the metrics that validation would log now; nothing is logged, and no callback is called."""
    with in_stage(trainer, RunningStage.VALIDATING), ExitStack() as stack:
        loader = validation_loader(trainer)
        stack.enter_context(extra_pass())
        stack.enter_context(isolated(module, loader))
        stack.enter_context(kept(module=module))
        # In the first forward after a training step a DDP model gives all ranks the buffers of the first, and notes in
        # this flag that it has: that is left to the fit's own validation.
        wrapped = [trainer.strategy.model] if isinstance(trainer.strategy.model, DistributedDataParallel) else []
        stack.enter_context(kept_attribute(wrapped, "require_forward_param_sync"))
        stack.callback(loader.reset)  # ends the workers
        return validation_metrics(trainer, loader)


@contextmanager
def on_training_device(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Have the module where it was trained: Lightning moves it to the CPU before ``on_fit_end``."""
    before = module.device
    module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        module.to(before)


def _batches(loader: Any) -> Iterator[Any]:
    if not isinstance(loader, CombinedLoader):
        yield from loader
        return
    batches: Iterator[Any] = iter(loader)  # before its length is asked for, which it does not know earlier
    # The loader knows its limits, and leaves it to whoever fetches from it to stop there. It is its own iterator: a
    # second iter(), as a for loop calls it, would begin again, and start workers twice.
    length = sized_len(loader)
    count = 0
    while length is None or count < length:
        try:
            batch, _, _ = next(batches)
        except StopIteration:
            return
        count += 1
        yield batch


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
    datamodule = getattr(trainer, "datamodule", None)  # whose transfer hooks see each batch
    sources = loader.flattened if isinstance(loader, CombinedLoader) else [loader]
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    with (
        kept_random_states(loader),
        kept_sources(*sources, {} if datamodule is None else vars(datamodule)),
        # Lightning validates in inference mode, whose tensors could not be written into again outside it.
        torch.inference_mode(False),
        torch.no_grad(),
        kept(optimizers=trainer.optimizers, schedulers=schedulers),
    ):
        yield


@contextmanager
def muted(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Let ``self.log``, ``self.log_dict``, ``self.print`` and ``self.logger`` of the module go nowhere."""
    deaf = [package_of(trainer).loggers.logger.DummyLogger() for _ in trainer.loggers]
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, LightningModule):
                stack.enter_context(_replaced(vars(part), dict.fromkeys(("log", "log_dict", "print"), nothing)))
        stack.enter_context(exchanged(trainer, "should_stop", trainer.should_stop))
        stack.enter_context(exchanged(trainer, "loggers", deaf))
        yield


def in_stage(trainer: Trainer, stage: RunningStage) -> AbstractContextManager[None]:
    """Let ``trainer.training`` and its like answer for `stage`: batch transfer hooks ask them whether to augment."""
    return exchanged(trainer.state, "stage", stage)


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
