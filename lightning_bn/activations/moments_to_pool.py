"""Readings of all layers put together, flat: as many kernels for a hundred layers as for one, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_bn.activations.call_sites import CallSite
from lightning_bn.activations.tensor_to_moments import TensorMoments, finite_moments
from lightning_bn.moments import Moments, wide_dtype


class Key(NamedTuple):
    """Whose readings belong together."""

    what: str  # "activation", "gradient", "input" of a layer, or "given" to the model
    place: CallSite
    width: int  # C, its channels


what_of: Callable[[Key], str] = attrgetter("what")
width_of: Callable[[Key], int] = attrgetter("width")


@dataclass(frozen=True)
class Pool:
    """What many layers were like; a layer's channels follow the ones of the layer before. S channels of L layers in
    all."""

    keys: tuple[Key, ...]
    seen: tuple[int, ...]  # by key, values per channel, finite or not
    channels: Tensor  # (4, S), widest dtype: count, mean and m2 of the finite values, and zeros
    layers: Tensor  # (3, L), widest dtype: least and greatest of the finite values and 0, saturated values

    def on(self, channels: Tensor, layers: Tensor) -> Pool:
        """Return the same with its tensors elsewhere."""
        return Pool(self.keys, self.seen, channels, layers)

    def split(self) -> list[Tensor]:
        """Return `channels` by key: views (4, C)."""
        return list(self.channels.split(list(map(width_of, self.keys)), dim=1))

    def part(self, *kinds: str) -> Pool | None:
        """Return the readings of some kinds alone, None where there are none."""
        wanted = [what in kinds for what in map(what_of, self.keys)]
        if not any(wanted) or all(wanted):
            return self if any(wanted) else None
        which = torch.tensor(wanted)
        channels = which.repeat_interleave(torch.tensor(list(map(width_of, self.keys))))
        keys, seen = tuple(compress(self.keys, wanted)), tuple(compress(self.seen, wanted))
        return Pool(keys, seen, self.channels[:, channels], self.layers[:, which])


@torch.no_grad()
def flatten(readings: Sequence[tuple[tuple[Key, ...], TensorMoments]], device: torch.device) -> Pool:
    """Return one pool of all readings, in their order, a key as often as it was read."""
    each = [reading for _, reading in readings]
    widths = [len(reading.variance) for reading in each]
    dtype = wide_dtype(device)

    is_here = {reading.variance.device for reading in each} == {device}

    def together(tensors: Sequence[Tensor]) -> Tensor:
        flat = [tensor if tensor.dim() == 1 else tensor.flatten() for tensor in tensors]
        return torch.cat(flat if is_here else [tensor.to(device) for tensor in flat]).to(dtype)

    def or_zeros(tensors: Sequence[Tensor | None], sizes: list[int]) -> Tensor:
        missing = [size for tensor, size in zip(tensors, sizes, strict=True) if tensor is None]
        filler = iter(torch.zeros(sum(missing), device=device).split(missing) if missing else ())
        return together([next(filler) if tensor is None else tensor for tensor in tensors])

    # Repeated on the host, by numpy in a quarter of the time that torch takes, and not waited for.
    numbers = np.array([(reading.positions, reading.scale) for reading in each], dtype=np.float64).T
    positions, scale = torch.from_numpy(numbers.repeat(widths, axis=1)).to(device, dtype, non_blocking=True)
    centre, variance = together([reading.centre for reading in each]), together([reading.variance for reading in each])
    if all(reading.count is None for reading in each):
        moments = Moments(positions, centre, variance * positions)
    else:
        counts = [torch.full_like(r.variance, r.positions) if r.count is None else r.count for r in each]
        rest = or_zeros([reading.rest for reading in each], widths)
        moments = finite_moments(positions, together(counts), centre, rest, variance)
    zeros = or_zeros([reading.zeros for reading in each], widths)
    extremes = [reading.extremes if is_here else reading.extremes.to(device) for reading in each]
    saturated = or_zeros([reading.saturated for reading in each], [len(keys) for keys, _ in readings])
    return Pool(
        tuple(chain.from_iterable(keys for keys, _ in readings)),
        tuple(chain.from_iterable([reading.positions] * len(keys) for keys, reading in readings)),
        torch.stack((moments.count, moments.mean / scale, moments.m2 / scale.square(), zeros)),
        torch.cat((torch.cat(extremes, dim=1).to(dtype), saturated[None])),
    )


@torch.no_grad()
def merge(pools: Sequence[Pool]) -> Pool:
    """Return one pool with each key once, on the device of the first; moments merge as by Chan, Golub and LeVeque, all
    at once.

    ``mean = sum(count * mean) / count``, ``m2 = sum(m2 + count * (part mean - mean)**2)``: never a square less a
    square.
    """
    keys = tuple(chain.from_iterable(pool.keys for pool in pools))
    if len(pools) == 1 and len({*keys}) == len(keys):
        return pools[0]
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    seen = [0] * len(places)
    for pool in pools:
        for key, number in zip(pool.keys, pool.seen, strict=True):
            seen[places[key]] += number
    channels = torch.cat([pool.channels for pool in pools], dim=1)
    layers = torch.cat([pool.layers for pool in pools], dim=1)
    device, size = channels.device, sum(key.width for key in places)
    here = torch.tensor([places[key] for key in keys]).to(device, non_blocking=True)
    where = _channel_places(keys, places).to(device, non_blocking=True)

    def summed(values: Tensor) -> Tensor:
        return values.new_zeros(size).index_add_(0, where, values)

    count, mean, m2, zeros = channels.unbind()
    total = summed(count)
    together = summed(count * mean) / torch.where(total > 0, total, 1.0)
    m2 = summed(m2 + count * (mean - together[where]).square())
    low, high = (
        layers.new_zeros(len(places)).scatter_reduce_(0, here, layers[row], reduce, include_self=False)
        for row, reduce in ((0, "amin"), (1, "amax"))
    )
    saturated = layers.new_zeros(len(places)).index_add_(0, here, layers[2])
    return Pool(
        tuple(places),
        tuple(seen),
        torch.stack((total, together, m2, summed(zeros))),
        torch.stack((low, high, saturated)),
    )


def _channel_places(keys: tuple[Key, ...], places: dict[Key, int]) -> Tensor:
    """Where in the merged flat vector each channel of the parts belongs: (sum of widths,) int64, on the host."""
    starts, start = [], 0
    for key in places:
        starts.append(start)
        start += key.width
    widths = torch.tensor([key.width for key in keys])
    ends = widths.cumsum(0)
    offset = torch.tensor([starts[places[key]] for key in keys]) - (ends - widths)
    return torch.arange(int(ends[-1])) + offset.repeat_interleave(widths)
