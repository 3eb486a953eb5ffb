"""Context managers that change a model for a while, and restore every flag on exit, also after an exception."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.discovery import find_batch_norms
from lightning_bn.torch_internals import is_compiled


class _Passes(threading.local):
    depth = 0


_passes = _Passes()


@contextmanager
def extra_pass() -> Iterator[None]:
    """Say that what runs inside is a pass of this package's own, which the monitor is not to take for training or
    validation."""
    _passes.depth += 1
    try:
        yield
    finally:
        _passes.depth -= 1


def is_extra_pass() -> bool:
    """Whether this thread is inside `extra_pass`."""
    return _passes.depth > 0


@contextmanager
def no_garbage_collected() -> Iterator[bool]:
    """Let Python not look for garbage inside, where thousands of objects are made and none is dropped: it would walk
    all that the process holds, the more often the larger the model. Yields whether it looked before."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield was_enabled
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def kept_attribute(modules: Iterable[nn.Module], name: str) -> Iterator[None]:
    """Give each module its own value of the attribute `name` back at exit."""
    before = [(module, getattr(module, name)) for module in modules]
    try:
        yield
    finally:
        for module, value in before:
            setattr(module, name, value)


@contextmanager
def held_in_eval(layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Keep batch norms in eval mode from their next forward on, whoever calls ``train()`` of them or of a module around
    them, or sets their flag; each flag is as before at exit. Copies that are made inside are held by nobody."""
    layers = list(layers)
    with kept_attribute(layers, "training"), ExitStack() as stack:
        for layer in layers:
            stack.callback(_give_train_back, layer, vars(layer).get("train"))
            vars(layer)["train"] = _StaysInEval(layer)
            stack.callback(layer.register_forward_pre_hook(_back_to_eval, prepend=True).remove)
        yield


def _give_train_back(layer: nn.Module, before: Any) -> None:
    del layer.train
    if before is not None:  # of a layer that has one of its own
        vars(layer)["train"] = before


def is_held_in_eval(layer: nn.Module) -> bool:
    """Whether the layer is inside of `held_in_eval`."""
    return isinstance(vars(layer).get("train"), _StaysInEval)


class _StaysInEval:
    """Stands before a layer's own ``train``."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, mode: bool = True) -> nn.Module:
        for child in self._layer.children():  # an activation or a dropout of the layer's own
            child.train(mode)
        return self._layer

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._layer, "train")  # which a copy does not have yet, so it gets that of its class


def _back_to_eval(layer: nn.Module, args: tuple[Any, ...]) -> None:
    if is_held_in_eval(layer):  # not a copy, which has this hook too
        layer.training = False


@contextmanager
def paused_statistics(module: nn.Module) -> Iterator[None]:
    """Let no forward move the running statistics of any batch-norm layer in `module`.

    In training mode the layers still normalise with the batch; nothing else changes. For an extra forward that training
    statistics should not see: a second pass of SAM, a gradient penalty, a metric on training batches. It works on
    torch's layers, this package's and subclasses of either; it nests, and every layer gets its own flag back, also on
    an exception.

    Args:
        module: any module; its batch-norm layers are found at entry.

    Example:
        >>> import torch
        >>> from lightning_bn import BatchNorm1d, paused_statistics
        >>> layer = BatchNorm1d(2)
        >>> with paused_statistics(layer):
        ...     _ = layer(torch.randn(8, 2) + 5)
        >>> layer.running_mean, layer.num_batches_tracked.item()
        (tensor([0., 0.]), 0)
    """
    layers = [layer.module for layer in find_batch_norms(module) if layer.tracks]
    with ExitStack() as stack:
        stack.enter_context(kept_attribute(layers, "track_running_stats"))
        for layer in layers:
            # A training forward of torch's layer hands its buffers to the kernel, and counts, only where this is set.
            layer.track_running_stats = False
        yield


def eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which a compiled model runs as it was written: the code that was compiled knows nothing of
    later hooks."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


def out_of_inference_mode() -> AbstractContextManager[Any]:
    """Return a context without inference mode, for tensors that are written later; nothing where it is off already.

    torch's own context restores the grad mode when its guard is freed. After a Ctrl-C at the wrong moment the traceback
    holds that guard, and frees it when everybody else has restored the grad mode already.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
