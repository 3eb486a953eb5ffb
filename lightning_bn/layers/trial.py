"""Whether a layer with a forward of its own can get an averaging: tried out, since it can't be seen from outside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.buffers import running_mean, running_var
from lightning_bn.layers.subclasses import Exchange
from lightning_bn.modes import kept_attribute

__all__ = ["why_unsupported"]


def why_unsupported(layer: _BatchNorm) -> str | None:
    """Say why the subclass is not supported, or None if it is, after one forward of a copy with scratch buffers.

    Whether a forward hands its buffers and its momentum to the kernel can't be seen from outside; whether they hold the
    batch's moments afterwards can. It is tried once for a class and its settings.
    """
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy and has no buffers yet; run a batch through the model first"
    if layer.running_mean is None:
        return "it keeps no running statistics"
    if layer.num_batches_tracked is None:
        return "it does not count its batches (num_batches_tracked is None)"
    if isinstance(layer, nn.SyncBatchNorm):
        return (
            None  # torch's own, known to follow the pattern; in a process group it can't be tried out by one rank alone
        )
    if "forward" in layer.__dict__:
        return _tried(layer)  # one of its own, of which its class tells nothing
    known = _TRIED.setdefault(type(layer), {})
    settings = frozenset(
        (name, value) for name, value in vars(layer).items() if name != "training" and isinstance(value, (bool, str))
    )
    if settings not in known:
        known[settings] = _tried(layer)
    return known[settings]


_TRIED: WeakKeyDictionary[type, dict[frozenset[tuple[str, bool | str]], str | None]] = WeakKeyDictionary()


def _tried(layer: _BatchNorm) -> str | None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        if "forward" in layer.__dict__ and not running_mean(layer).is_meta:
            return _try_in_place(layer)
        return _try_out(_plain_copy(layer))


def _plain_copy(layer: _BatchNorm) -> _BatchNorm:
    twin = copy.deepcopy(layer)
    if running_mean(layer).is_meta:
        twin = twin.to_empty(device="cpu")
    twin = twin.cpu().float().train()
    twin.track_running_stats = True
    twin._forward_hooks.clear()
    twin._forward_pre_hooks.clear()
    return twin


def _try_in_place(layer: _BatchNorm) -> str | None:
    """Try out the layer itself: a forward that was put on it from outside may go on meaning this layer when it is
    copied."""
    exchange = Exchange(layer, None, scratch=True)
    with kept_attribute([layer], "training"), kept_attribute([layer], "track_running_stats"):
        layer.training = layer.track_running_stats = True
        exchange.make(layer)
        try:
            return _judge(layer, layer.forward)
        finally:
            exchange.undo(layer)


def _try_out(layer: _BatchNorm) -> str | None:
    running_mean(layer).zero_()
    running_var(layer).zero_()
    layer.momentum = 1.0
    return _judge(layer, layer)


def _judge(layer: _BatchNorm, forward: Callable[[Tensor], Any]) -> str | None:
    rank = 2 if isinstance(layer, nn.BatchNorm1d) else 5 if isinstance(layer, nn.BatchNorm3d) else 4
    data = torch.randn(4, layer.num_features, *[3] * (rank - 2)) + torch.arange(4.0).reshape(4, *[1] * (rank - 1))
    data = data.to(running_mean(layer).device)
    try:
        forward(data)
    except Exception as error:  # another's forward may raise anything; the reason is passed on
        return f"its forward, tried on a batch of shape {tuple(data.shape)}, raised {type(error).__name__}: {error}"
    var, mean = torch.var_mean(data, [0, *range(2, rank)], unbiased=True)
    if torch.allclose(running_mean(layer), mean, atol=1e-4) and torch.allclose(running_var(layer), var, rtol=1e-3):
        return None
    return "its forward does not leave the batch's mean and unbiased variance in its buffers when momentum is 1"
