"""Context managers in which a LightningModule's own code may run once more, and leave no trace in its training."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import Sampler
from torchmetrics import Metric, MetricCollection

from lightning_bn.callbacks.lightning_internals import forgotten_metric_names
from lightning_bn.recalibration.random_states import kept_random_states

__all__ = ["in_stage", "isolated", "muted"]


@contextmanager
def isolated(module: LightningModule, loader: Any = None) -> Iterator[None]:
    """Let the module's steps run without grad and leave the RNG, its torchmetrics and its plain Python attributes as they are.

    A step may add to ``self.step_outputs``, count in ``self.seen`` or update ``self.accuracy``: inside, it does so on copies. What it does
    to objects below those (a list in a dict) or outside the module is its own affair.

    Args:
        module: in a fit.
        loader: a loader that is iterated inside; its generators and samplers, which a running copy shares, are as before at exit.
    """
    with ExitStack() as stack:
        stack.enter_context(kept_random_states(loader))
        stack.enter_context(_kept_samplers(loader))
        # Lightning validates in inference mode, whose tensors could not be written into again outside it.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_own_metrics(module))
        stack.enter_context(forgotten_metric_names(module))
        for part in _lightning_modules(module):
            stack.enter_context(_own_attributes(part))
        yield


@contextmanager
def muted(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Let ``self.log``, ``self.log_dict``, ``self.print`` and ``self.logger`` of the module go nowhere."""
    loggers = trainer.loggers
    with ExitStack() as stack:
        for part in _lightning_modules(module):
            stack.enter_context(_replaced(vars(part), dict.fromkeys(("log", "log_dict", "print"), _nothing)))
        trainer.loggers = [DummyLogger() for _ in loggers]
        try:
            yield
        finally:
            trainer.loggers = loggers


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
def _kept_samplers(loader: Any) -> Iterator[None]:
    """Give each sampler its own attributes back: one may count its passes, or the batches that it gave."""
    loaders = loader.flattened if isinstance(loader, CombinedLoader) else [loader]
    parts = [getattr(each, name, None) for each in loaders for name in ("sampler", "batch_sampler")]
    parts += [getattr(part, "sampler", None) for part in parts]
    before = [(part, dict(vars(part))) for part in parts if isinstance(part, Sampler)]
    try:
        yield
    finally:
        for part, attributes in before:
            vars(part).clear()
            vars(part).update(attributes)


@contextmanager
def _own_metrics(module: LightningModule) -> Iterator[None]:
    """Exchange every torchmetrics object below `module` for a copy; the originals, put back at exit, have not been touched."""
    held = [
        (parent, name, child)
        for parent in module.modules()
        if not isinstance(parent, (Metric, MetricCollection))
        for name, child in parent.named_children()
        if isinstance(child, (Metric, MetricCollection))
    ]
    shared: dict[int, Any] = {}
    copies = [copy.deepcopy(child, shared) for _, _, child in held]
    try:
        for (parent, name, _), own in zip(held, copies, strict=True):
            setattr(parent, name, own)
        yield
    finally:
        for parent, name, child in held:
            setattr(parent, name, child)


@contextmanager
def _own_attributes(module: LightningModule) -> Iterator[None]:
    attributes = vars(module)
    framework = vars(LightningModule())
    before = {name: value for name, value in attributes.items() if name not in framework}
    own = {name: copy.copy(value) for name, value in before.items() if isinstance(value, (list, dict, set, deque))}
    with _replaced(attributes, own):
        try:
            yield
        finally:
            for name in [name for name in attributes if name not in framework and name not in before]:
                del attributes[name]
            attributes.update(before)


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
