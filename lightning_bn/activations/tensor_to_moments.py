"""What activations are like: a handful of kernels in their own dtype or float32, and nothing that waits for the
device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_bn.channel_moments import channel_moments
from lightning_bn.moments import Moments, wide_dtype
from lightning_bn.torch_internals import kernel_moments

# A sigmoid's slope within this share of its range from either bound is below a tenth of its largest; a tanh's likewise.
SATURATION_MARGIN = 0.025

# A float32 counts up to here without losing one.
_COUNTABLE = 2**24

# The squares of larger float32 values may overflow when they are summed.
_LARGE = 1e15

# How many values are put into buckets at once, so that their indices take little memory.
_BUCKETED = 2**20


@dataclass(slots=True)  # a frozen one takes several times as long to make
class TensorMoments:
    """Activations of K layers side by side: what the kernels gave, not yet put together; C channels in all, with
    `positions` values each.

    ``mean = (centre + rest * positions / count) / scale``; `variance` is the *biased* one around it, of data in which
    each value that is not finite was replaced by `centre`. `moments_of` undoes that, flat for all layers.
    """

    positions: int
    count: Tensor | None  # (1, C, 1, ...), integers: finite values; None: all
    centre: Tensor  # the same shape, or (C,); NaN where no value is finite
    rest: Tensor | None  # (C,), mean of the data from which `centre` was taken; None: 0
    variance: Tensor  # (C,)
    extremes: Tensor  # (2, K), least and greatest finite value, or 0
    scale: float  # all values were multiplied by it, so that their squares don't overflow
    zeros: Tensor | None  # (C,); None if `zeros=False`
    saturated: Tensor | None  # (K,), int64; None without bounds


def read(
    parts: Sequence[Tensor], *, zeros: bool = True, bounds: tuple[float, float] | None = None
) -> list[TensorMoments]:
    """Return the reading of activations of one shape: one of all together, which takes as many kernels as one of them
    does, or one of each where a value is not finite or next to too large. Memory beside one: at most twice its own.

    On the CPU, where a look at a value costs nothing, the fast kernels of `channel_moments` do it unless a value is not
    finite. Elsewhere the centre is the mean, and a second pass sums what is left of the centred data, which is as
    accurate in float32 as a sum in float64. A standard deviation beyond 1e19 is infinite there.

    Args:
        parts: K tensors (N, C, *spatial), not empty, floating point, of no graph: to switch gradients off costs as much
            as a kernel.
        zeros: whether to count zeros.
        bounds: the least and the greatest value the layers can give.
    """
    data = torch.cat(list(parts), dim=1) if len(parts) > 1 else parts[0]
    extremes = _extremes(data, parts) if _may_look(data) else None
    largest = 0.0 if extremes is None else _largest(extremes)
    if len(parts) > 1 and not largest <= _LARGE:
        return [reading for part in parts for reading in read([part], zeros=zeros, bounds=bounds)]
    positions = data.numel() // data.shape[1]
    if extremes is not None and math.isfinite(largest):
        around = _moments_on_host(data, largest, extremes)
    else:
        around = _masked_moments(data, len(parts))
    saturated = None if bounds is None else torch.stack([_count_saturated(part, *bounds) for part in parts])
    return [TensorMoments(positions, *around, _count_zeros(data, positions) if zeros else None, saturated)]


def moments_of(reading: TensorMoments) -> Moments:
    """Return the moments of the finite values of one reading, all three of shape (C,), in the widest dtype."""
    dtype = wide_dtype(reading.centre.device)
    centre, variance = reading.centre.flatten().to(dtype), reading.variance.to(dtype)
    positions = torch.full_like(centre, reading.positions)
    if reading.count is None or reading.rest is None:
        moments = Moments(positions, centre, variance * positions)
    else:
        count, rest = reading.count.flatten().to(dtype), reading.rest.to(dtype)
        moments = finite_moments(positions, count, centre, rest, variance)
    return Moments(moments.count, moments.mean / reading.scale, moments.m2 / reading.scale**2)


def finite_moments(positions: Tensor, count: Tensor, centre: Tensor, rest: Tensor, variance: Tensor) -> Moments:
    """Return the moments of the finite values alone; all vectors wide and of one length, whatever the layers they come
    from."""
    some = count > 0
    rest = rest * positions / count
    # What was filled in lies at the centre: `positions - count` values of m2 0. Chan's formula, undone; `rest` is next
    # to nothing.
    m2 = variance * positions - rest.square() * count * (positions - count) / positions
    return Moments(count, torch.where(some, centre + rest, 0.0), torch.where(some, m2.clamp(min=0), 0.0))


# `TensorMoments`'s count, centre, rest, variance, extremes and scale.
_Around: TypeAlias = tuple[Tensor | None, Tensor, Tensor | None, Tensor, Tensor, float]


def _extremes(data: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """The least and the greatest value of each part of data, (N, K C, *spatial): (2, K)."""
    if len(parts) > 1 and data.dtype == torch.float32 and data.device.type == "cpu" and data.is_contiguous():
        values = data.numpy().reshape(len(data), len(parts), -1)  # numpy takes a third of torch's time
        return torch.from_numpy(np.stack((values.min((0, 2)), values.max((0, 2)))))
    # Over the whole of each, which takes torch a fraction of the time along a dimension.
    low, high = zip(*[part.aminmax() for part in parts], strict=True)
    return torch.stack((*low, *high)).view(2, -1)


def _largest(extremes: Tensor) -> float:
    """The greatest absolute value, NaN where one is not finite."""
    low, high = extremes.tolist()
    return max(-min(low), max(high)) if math.isfinite(sum(low) + sum(high)) else math.nan


def _moments_on_host(data: Tensor, largest: float, extremes: Tensor) -> _Around:
    """The moments of finite activations on the CPU."""
    if largest > _LARGE:
        # By a power of two, which loses no digit.
        scale = 2.0 ** -math.frexp(largest)[1]
        mean, variance = channel_moments(data * scale)
    else:
        scale = 1.0
        mean, variance = channel_moments(data, largest)
    return None, mean, None, variance, extremes, scale


def _masked_moments(data: Tensor, parts: int) -> _Around:
    over = [dim for dim in range(data.dim()) if dim != 1]
    dtype = data.dtype if data.dtype in (torch.float32, torch.float64) else torch.float32
    clean = torch.nan_to_num(data, 0.0, 0.0, 0.0)
    # NaN and infinity differ from the 0 in their place.
    # These keep the dimensions that they sum over: made flat again for all layers at once, that costs nothing.
    count = torch.eq(data, clean).sum(over, keepdim=True)
    centre = clean.sum(over, keepdim=True, dtype=dtype) / count
    extremes = _extremes(clean, clean.chunk(parts, dim=1))
    if clean.dtype == dtype:
        centred = torch.sub(data, centre, out=clean)
    else:
        del clean  # before the float32 copy is made, not after it
        centred = data.to(dtype).sub_(centre)
    rest, variance = kernel_moments(centred.nan_to_num_(0.0, 0.0, 0.0))
    return count, centre, rest, variance, extremes, 1.0


def _may_look(data: Tensor) -> bool:
    """Whether a branch on a value costs nothing: anywhere but on the CPU it waits for the device."""
    return data.device.type == "cpu"


def _count_zeros(data: Tensor, positions: int) -> Tensor:
    """How many values are exactly 0, per channel: (C,)."""
    over = [dim for dim in range(data.dim()) if dim != 1]
    if data.device.type == "cpu" and positions < _COUNTABLE and data.element_size() >= 4:
        # Comparing straight into float32 and adding up takes a third of the time of counting bools.
        return torch.eq(data, 0, out=torch.empty_like(data, dtype=torch.float32)).sum(over)
    return torch.eq(data, 0).sum(over)


def _count_saturated(data: Tensor, low: float, high: float) -> Tensor:
    margin = SATURATION_MARGIN * (high - low)
    return ((data <= low + margin) | (data >= high - margin)).sum()


def histogram_edges() -> Tensor:
    """Return the edges between the buckets of `ActivationStats`, ascending: ``+-2**(k / 4)`` from 2**-16 to 2**16 and 0
    between them."""
    positive = torch.exp2(torch.arange(-64, 65, dtype=torch.float64) / 4)
    return torch.cat((-positive.flip(0), positive))


@torch.no_grad()
def bucket_counts(data: Tensor) -> Tensor:
    """Return the number of finite values in each bucket between `histogram_edges`: (B + 1,) int64."""
    dtype = data.dtype if data.dtype in (torch.float32, torch.float64) else torch.float32
    edges = histogram_edges().to(device=data.device, dtype=dtype, non_blocking=True)
    # Unlike bincount and histc, adding in place needs no value from the device.
    counts = torch.zeros(len(edges) + 1, dtype=torch.int64, device=data.device)
    for part in data.reshape(-1).split(_BUCKETED):
        counts.index_add_(0, torch.bucketize(part.to(dtype), edges), part.isfinite().to(torch.int64))
    return counts
