"""The step from a batch's moments to a layer's buffers: taken at once, where the batch is finite, or put off until ranks are merged."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging import Averaging, Batch, Cumulative, Exponential

# Names of attributes by which synchronization over ranks makes itself known to a layer, of whatever class, while it lasts.
SYNCHRONISED = "_values_of_all_ranks"  # values per channel in the last batch of all ranks
DEFERRED = "_deferred_batches"  # a list to which batches go that are yet to be merged with the other ranks'


def is_synchronised(layer: _BatchNorm) -> bool:
    """Whether the layer normalises with the batch of all ranks."""
    return SYNCHRONISED in layer.__dict__


def is_deferred(layer: _BatchNorm) -> bool:
    """Whether the layer's batches are merged with those of the other ranks before an averaging takes them."""
    return DEFERRED in layer.__dict__


def counts(layer: _BatchNorm, input: Tensor) -> bool:
    """Whether `input` is a batch to average: one that is empty here may be a part of the other ranks' batch."""
    return input.numel() > 0 or is_synchronised(layer) or is_deferred(layer)


def values_per_channel(layer: _BatchNorm, input: Tensor, dtype: torch.dtype) -> Tensor:
    """Values per channel in this batch, of all ranks where the layer is synchronised: () in `dtype`, on the input's device."""
    if is_synchronised(layer):
        count: Tensor = layer.__dict__[SYNCHRONISED]
        return count.to(dtype)
    return torch.full((), input.numel() // layer.num_features, dtype=dtype, device=input.device)


def torch_rule(momentum: float | None) -> Averaging:
    """The averaging that torch means by `momentum`."""
    return Cumulative() if momentum is None else Exponential(momentum)


def rule_of(layer: _BatchNorm) -> Averaging:
    """The averaging that moves the layer's statistics; for one of torch's, the same rule in this package's words."""
    averaging = getattr(layer, "averaging", None)
    return averaging if isinstance(averaging, Averaging) else _torch_rule(layer.momentum)


_torch_rule = cache(torch_rule)  # a module made anew for each layer and step would be what drift costs


def is_finite(var: Tensor) -> Tensor:
    """Whether the moments of a batch are finite, as a tensor, so that nothing waits for the device: () bool.

    The variance tells for both: it is a sum of squared differences from the mean, NaN or infinite as soon as that is.
    """
    return (var < math.inf).all()


@torch.no_grad()
def advance(layer: _BatchNorm, averaging: Averaging, batch: Batch, *, now: bool = False) -> None:
    """Let `averaging` take `batch` in and write the statistics it gives into the layer's buffers, in place.

    Where the layer's batches are deferred, this one is put with them; `now` is for whoever has merged it since.
    """
    deferred = layer.__dict__.get(DEFERRED)
    if deferred is not None and not now:
        deferred.append((layer, averaging, batch))
        return
    dtype = batch.mean.dtype
    mean, var = averaging.update(layer.running_mean.to(dtype), layer.running_var.to(dtype), batch)
    settle(layer, mean, var, batch.valid)


def settle(layer: _BatchNorm, mean: Tensor, var: Tensor, valid: Tensor | None) -> None:
    """Write new running statistics in place and count the batch, both only where `valid`; the device alone knows whether."""
    for buffer, value in ((layer.running_mean, mean), (layer.running_var, var)):
        buffer.copy_(value if valid is None else torch.where(valid, value.to(buffer.dtype), buffer))
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1 if valid is None else valid)
