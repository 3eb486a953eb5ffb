"""One more pass over the training data, or the validation data, in the middle of a fit that knows nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_bn.callbacks.batch_input import SizedBatches
from lightning_bn.callbacks.both_lightnings import CombinedLoader, LightningModule, Trainer
from lightning_bn.callbacks.isolation import in_stage, isolated, muted
from lightning_bn.callbacks.lightning_internals import (
    afresh,
    batch_to_device,
    training_loader,
    validation_loader,
    validation_metrics,
)
from lightning_bn.modes import eager, extra_pass, kept_attribute
from lightning_bn.recalibration.kept_objects import kept


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
        stack.enter_context(_kept_broadcast(trainer.strategy.model))
        stack.callback(loader.reset)  # ends the workers
        return validation_metrics(trainer, loader)


@contextmanager
def _kept_broadcast(model: nn.Module | None) -> Iterator[None]:
    """Leave it to the fit's own validation to give all ranks the buffers of the first.

    A DDP model does so in the first forward after a training step, and notes in this flag that it has.
    """
    with kept_attribute([model] if isinstance(model, DistributedDataParallel) else [], "require_forward_param_sync"):
        yield


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
