"""Readings of all layers put together, flat: as many kernels for a hundred layers as for one, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        return list(self.channels.split([key.width for key in self.keys], dim=1))


@torch.no_grad()
def flatten(readings: Sequence[tuple[Key, TensorMoments]], device: torch.device) -> Pool:
    """Return one pool of all readings, in their order, a key as often as it was read."""
    keys = tuple(key for key, _ in readings)
    seen = tuple(reading.positions for _, reading in readings)
    each = [reading for _, reading in readings]
    dtype = wide_dtype(device)

    def together(tensors: list[Tensor]) -> Tensor:
        here = [tensor if tensor.device == device else tensor.to(device) for tensor in tensors]
        if len({tensor.dim() for tensor in here}) > 1:
            here = [tensor.flatten() for tensor in here]
        return torch.cat(here, dim=min(here[0].dim() - 1, 1)).flatten().to(dtype)

    widths = [key.width for key in keys]
    positions, scale = _numbers([(reading.positions, reading.scale) for reading in each], keys, dtype, device)
    centre, variance = together([reading.centre for reading in each]), together([reading.variance for reading in each])
    if all(reading.count is None for reading in each):
        moments = Moments(positions, centre, variance * positions)
    else:
        counts = [torch.full_like(r.variance, r.positions) if r.count is None else r.count for r in each]
        rest = together(_or_zeros([reading.rest for reading in each], widths, device))
        moments = finite_moments(positions, together(counts), centre, rest, variance)
    zeros = together(_or_zeros([reading.zeros for reading in each], widths, device))
    low, high = (
        torch.stack([getattr(reading, name).to(device) for reading in each]).to(dtype) for name in ("low", "high")
    )
    saturated = torch.cat(
        _or_zeros(
            [None if each.saturated is None else each.saturated.reshape(1) for each in each], [1] * len(each), device
        )
    )
    return Pool(
        keys,
        seen,
        torch.stack((moments.count, moments.mean / scale, moments.m2 / scale.square(), zeros)),
        torch.stack((low, high, saturated.to(dtype))),
    )


@torch.no_grad()
def merge(pools: Sequence[Pool]) -> Pool:
    """Return one pool with each key once, on the device of the first; moments merge as by Chan, Golub and LeVeque, all
    at once.

    ``mean = sum(count * mean) / count``, ``m2 = sum(m2 + count * (part mean - mean)**2)``: never a square less a
    square.
    """
    keys = tuple(key for pool in pools for key in pool.keys)
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    if len(pools) == 1 and len(places) == len(keys):
        return pools[0]
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


def _numbers(
    values: list[tuple[int, float]], keys: tuple[Key, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Numbers that the host knows of each reading, for each of its channels: two vectors (S,)."""
    # Repeated on the host, by numpy in a quarter of the time that torch takes, and not waited for.
    numbers = np.repeat(np.array(values, dtype=np.float64).T, [key.width for key in keys], axis=1)
    positions, scale = torch.from_numpy(numbers).to(device, dtype, non_blocking=True)
    return positions, scale


def _or_zeros(tensors: list[Tensor | None], widths: list[int], device: torch.device) -> list[Tensor]:
    """The tensors, with zeros of the given widths for the ones that are None: one allocation for all of them."""
    missing = [width for tensor, width in zip(tensors, widths, strict=True) if tensor is None]
    filler = iter(torch.zeros(sum(missing), device=device).split(missing) if missing else ())
    return [(next(filler) if tensor is None else tensor.to(device)) for tensor in tensors]
