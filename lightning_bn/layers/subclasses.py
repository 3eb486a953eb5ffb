"""Averaging for batch-norm subclasses of others' making, which keep their class and run their own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging import Averaging, Batch
from lightning_bn.layers.settlement import advance, counts, is_deferred, is_finite, settle, torch_rule, values_per_channel
from lightning_bn.torch_internals import in_backward

__all__ = ["is_served", "observe", "obstacle", "release", "serve"]


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class _Service:
    """Two hooks around a layer's own forward: it runs with scratch tensors for buffers, and then its own get the average.

    A batch-norm forward that follows torch's pattern calls ``F.batch_norm`` with the module's own buffers and ``momentum``. With
    zeroed buffers and momentum 1 it leaves the batch's mean and unbiased variance in them, whatever else it does (timm's also drop).
    The buffers are exchanged, not overwritten: autograd keeps those of the forward for backward, and finds them changed otherwise.
    """

    def __init__(self, layer: _BatchNorm, averaging: Averaging | None) -> None:
        # None: torch's rule, by the layer's momentum, which third parties set at any time. Where the kernel can compute the averaging,
        # it does so by that momentum too.
        self._averaging = None if averaging is None or averaging.kernel_momentum is not None else averaging
        self._own: dict[str, Any] | None = None
        self._handles = [
            layer.register_forward_pre_hook(self._enter, prepend=True),
            # Called on an exception too: a forward that failed must not leave the scratch tensors behind.
            layer.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

    def _in_kernel(self, layer: _BatchNorm) -> bool:
        return self._averaging is None and not is_deferred(layer)

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _enter(self, layer: _BatchNorm, args: tuple[Any, ...]) -> None:
        if not layer.track_running_stats:
            return
        self._own = {name: getattr(layer, name) for name in (*_BUFFERS, "momentum")}
        for name in _BUFFERS:
            setattr(layer, name, getattr(layer, name).clone())
        if layer.training and not self._in_kernel(layer):
            layer.running_mean.zero_()
            layer.running_var.zero_()
            layer.momentum = 1.0

    @torch.no_grad()
    def _leave(self, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor | None) -> None:
        if self._own is None:
            return
        mean, var = layer.running_mean, layer.running_var
        for name, value in self._own.items():
            setattr(layer, name, value)
        self._own = None
        if output is None or not layer.training or in_backward():
            return
        dtype = torch.promote_types(mean.dtype, torch.float32)
        mean, var = mean.to(dtype), var.to(dtype)
        valid = is_finite(var)
        (input, *_) = (*args, *kwargs.values())
        if self._in_kernel(layer):
            settle(layer, mean, var, valid)
        elif counts(layer, input):
            count = values_per_channel(layer, input, dtype)
            averaging = torch_rule(layer.momentum) if self._averaging is None else self._averaging
            advance(layer, averaging, Batch(mean, var, count, layer.num_batches_tracked + 1, valid))


def observe(layer: _BatchNorm) -> Callable[[], None]:
    """Let the layer's batches be put off, and then averaged by torch's rule; without a trace but two hooks. Return what removes them."""
    return _Service(layer, None).end


def is_served(layer: _BatchNorm) -> bool:
    """Whether `serve` gave the layer an averaging."""
    return "_lightning_bn_service" in layer.__dict__


def serve(layer: _BatchNorm, averaging: Averaging) -> None:
    """Have `averaging` keep the running statistics of `layer` from now on."""
    release(layer)
    layer.averaging = averaging.for_layer(layer.running_mean)
    if averaging.kernel_momentum is not None:
        layer.momentum = averaging.kernel_momentum
    layer.__dict__["_lightning_bn_service"] = _Service(layer, layer.averaging)


def release(layer: _BatchNorm) -> None:
    """Undo `serve`; a layer that is not served stays as it is."""
    service = layer.__dict__.pop("_lightning_bn_service", None)
    if service is not None:
        service.end()
        del layer.averaging


def obstacle(layer: _BatchNorm) -> str | None:
    """Say why the subclass can't be served, or None where it can, after one forward of a copy with scratch buffers.

    Whether a forward hands its buffers and its momentum to the kernel can't be seen from outside; whether they hold the batch's
    moments afterwards can. It is tried once for a class and its settings.
    """
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy and has no buffers yet; run a batch through the model first"
    if layer.running_mean is None:
        return "it keeps no running statistics"
    if layer.num_batches_tracked is None:
        return "it does not count its batches (num_batches_tracked is None)"
    if isinstance(layer, nn.SyncBatchNorm):
        return None  # torch's own, known to follow the pattern; in a process group it can't be tried out by one rank alone
    if "forward" in layer.__dict__:
        return _tried(layer)  # one of its own, of which its class tells nothing
    known = _TRIED.setdefault(type(layer), {})
    settings = frozenset((name, value) for name, value in vars(layer).items() if name != "training" and isinstance(value, (bool, str)))
    if settings not in known:
        known[settings] = _tried(layer)
    return known[settings]


_TRIED: WeakKeyDictionary[type, dict[frozenset[tuple[str, bool | str]], str | None]] = WeakKeyDictionary()


def _tried(layer: _BatchNorm) -> str | None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return _try_out(_plain_copy(layer))


def _plain_copy(layer: _BatchNorm) -> _BatchNorm:
    twin = copy.deepcopy(layer)
    if layer.running_mean.is_meta:
        twin = twin.to_empty(device="cpu")
    twin = twin.cpu().float().train()
    twin.track_running_stats = True
    twin._forward_hooks.clear()
    twin._forward_pre_hooks.clear()
    return twin


def _try_out(layer: _BatchNorm) -> str | None:
    layer.running_mean.zero_()
    layer.running_var.zero_()
    layer.momentum = 1.0
    rank = {nn.BatchNorm1d: 2, nn.BatchNorm3d: 5}.get(next((c for c in type(layer).__mro__ if c in _TORCH_LAYERS), None), 4)
    data = torch.randn(4, layer.num_features, *[3] * (rank - 2)) + torch.arange(4.0).reshape(4, *[1] * (rank - 1))
    try:
        layer(data)
    except Exception as error:  # another's forward may raise anything; the reason is passed on
        return f"its forward, tried on a batch of shape {tuple(data.shape)}, raised {type(error).__name__}: {error}"
    over = [0, *range(2, rank)]
    var, mean = torch.var_mean(data, over, unbiased=True)
    if torch.allclose(layer.running_mean, mean, atol=1e-4) and torch.allclose(layer.running_var, var, rtol=1e-3):
        return None
    return "its forward does not leave the batch's mean and unbiased variance in its buffers when momentum is 1"


_TORCH_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
