"""Context managers that change a model for a while, and restore every flag on exit, also after an exception."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.buffers import running_statistics
from lightning_bn.discovery import find_batch_norms
from lightning_bn.torch_internals import is_compiled

__all__ = [
    "eager",
    "evaluating",
    "extra_pass",
    "is_extra_pass",
    "kept_attribute",
    "kept_modes",
    "normalising_with_batches",
    "out_of_inference_mode",
    "paused_statistics",
]


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
def kept_attribute(modules: Iterable[nn.Module], name: str) -> Iterator[None]:
    """Give each module its own value of the attribute `name` back at exit."""
    before = [(module, getattr(module, name)) for module in modules]
    try:
        yield
    finally:
        for module, value in before:
            setattr(module, name, value)


@contextmanager
def kept_modes(module: nn.Module) -> Iterator[None]:
    """Give every submodule its own ``training`` flag back at exit, whatever is done to the flags inside.

    ``module.train()`` at the end would undo a deliberate freeze: each flag is restored by itself.
    """
    with kept_attribute(list(module.modules()), "training"):
        yield


@contextmanager
def evaluating(module: nn.Module, *, training: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Put `module` and all below it in eval mode, but the modules of `training`; each flag is as before at exit."""
    with kept_modes(module):
        module.eval()
        for submodule in training:
            # Not .train(): that is recursive, and a layer may carry modules of its own (an activation, a dropout).
            submodule.training = True
        yield


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


@contextmanager
@torch.no_grad()
def normalising_with_batches(layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Let batch-norm layers in eval mode normalise with each batch's own mean and *biased* variance.

    No running statistics move and no rank waits for another. An input with one value a channel has no variance and is
    normalised with the running statistics, as ever in eval.

    Args:
        layers: those that keep running statistics; their buffers are as before at exit.
    """
    held = [(layer, *running_statistics(layer)) for layer in layers]
    before = [(mean.clone(), var.clone()) for _, mean, var in held]  # DDP may write into them inside
    with ExitStack() as stack:
        for layer, mean, var in held:
            stack.callback(layer.register_forward_pre_hook(_hide, with_kwargs=True).remove)
            # Whoever looks at the layer between its forwards finds its buffers.
            shown = partial(_show, mean=mean, var=var)
            stack.callback(layer.register_forward_hook(shown, always_call=True).remove)
        try:
            yield
        finally:
            for (_, mean, var), (old_mean, old_var) in zip(held, before, strict=True):
                mean.copy_(old_mean)
                var.copy_(old_var)


def _hide(layer: _BatchNorm, args: Any, kwargs: Any) -> None:
    """An eval forward without buffers takes the batch's statistics, without the meeting of ranks that training has."""
    input = args[0] if args else kwargs.get("input")
    if isinstance(input, Tensor) and input.numel() > layer.num_features:
        layer._buffers.update(running_mean=None, running_var=None)


def _show(layer: _BatchNorm, args: Any, output: Any, *, mean: Tensor, var: Tensor) -> None:
    layer._buffers.update(running_mean=mean, running_var=var)


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
