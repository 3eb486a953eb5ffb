"""One transfer brings everything to the host, where it stays flat: the channels of all rows one behind the other, so
that a hundred layers cost what one does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_bn.activations.moments_to_pool import Pool, width_of

# The largest of many channels of one layer is a few times as large as their median by chance.
RUNS_AWAY = 10.0

# Of its layer's mean: Sokar et al. (2023) call a unit below that dormant, of the mean absolute value.
DORMANT = 0.025

_DTYPE, _DEVICE = attrgetter("dtype"), attrgetter("device")

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def silent_numbers() -> np.errstate:
    """Return a context, or a decorator, in which NaN is an answer and needs no warning."""
    return np.errstate(divide="ignore", invalid="ignore", over="ignore")


def pieces(flat: Array, widths: Sequence[int] | NDArray[np.int64]) -> list[Array]:
    """Return views of the rows' parts of a vector; `np.split` takes many times as long."""
    ends = np.cumsum(widths).tolist()
    return [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True)
class Flags:
    """What the host knows of K rows: (K,) each."""

    is_function: Mask  # an activation function, or what else a user asked for, but no batch norm
    is_bounded: Mask  # one whose values have bounds
    is_output: Mask  # makes what the model returns
    is_input: Mask  # what the model was given
    is_stream: Mask  # a residual sum, or a layer or RMS norm, in which all channels are of one scale
    has_positions: Mask  # each channel has several values a sample, as in an image
    is_centred: Mask  # a batch norm feeds it, so that each channel is given as much below 0 as above


@dataclass(frozen=True)
class Channels:
    """Activations, or gradients, of K rows with S channels in all; a row's channels follow those of the row before."""

    widths: NDArray[np.int64]  # (K,)
    positions: Array  # (K,), values per channel, finite or not
    count: Array  # (S,), finite values
    mean: Array  # (S,)
    m2: Array  # (S,)
    zeros: Array  # (S,)
    low: Array  # (K,)
    high: Array  # (K,)
    saturated: Array  # (K,), values
    flags: Flags
    dead: Mask  # (S,): has been zero for so long that it won't fire again
    lone: Mask  # (S,): dead, which chance does not explain for a channel by itself
    died: Mask  # (S,): dead, and has fired before
    rank: Array  # (K,), effective rank, NaN where it was not measured

    @classmethod
    def of(
        cls,
        pool: Pool,
        flags: Flags,
        dead_of: Callable[[Pool, Mask], tuple[Mask, Mask, Mask]] | None = None,
        rank: Array | None = None,
    ) -> Channels:
        """Return what a pool on the host holds.

        Args:
            pool: of K keys.
            flags: of its rows.
            dead_of: tells, given which channels are silent in this sample, which are dead, which of these count by
                themselves, and which have fired before; None: the silent ones, and none.
            rank: effective rank of each row, None where none was measured.
        """
        widths = np.array(list(map(width_of, pool.keys)), dtype=np.int64)
        positions = np.array(pool.seen, dtype=np.float64)
        count, mean, m2, zeros = pool.channels.double().numpy()
        low, high, saturated = pool.layers.double().numpy()
        silent = zeros == positions.repeat(widths)
        none = np.zeros_like(silent)
        dead, lone, died = (silent, none, none) if dead_of is None else dead_of(pool, silent)
        rank = np.full(len(widths), np.nan) if rank is None else rank
        return cls(widths, positions, count, mean, m2, zeros, low, high, saturated, flags, dead, lone, died, rank)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        return np.cumsum(self.widths) - self.widths

    def total(self, values: Array | Mask) -> Array:
        """Return the sum over the channels of each row: (K,)."""
        sums: Array = np.add.reduceat(values, self.starts, dtype=np.float64)
        return sums

    def largest(self, values: Array) -> Array:
        """Return the greatest over the channels of each row, NaN aside: (K,)."""
        found: Array = np.fmax.reduceat(values, self.starts)
        return found

    @cached_property
    def values(self) -> Array:
        """All values of each row, finite or not: (K,)."""
        return self.positions * self.widths

    @cached_property
    def n(self) -> Array:
        """Finite values of each row: (K,)."""
        return self.total(self.count)

    @cached_property
    def row_mean(self) -> Array:
        return self.total(self.count * self.mean) / self.n

    @cached_property
    def row_std(self) -> Array:
        """*Unbiased, pooled* over the channels: (K,)."""
        between = self.count * np.square(self.mean - self.row_mean.repeat(self.widths))
        variance = self.total(self.m2 + between) / (self.n - 1)
        return np.where(self.n > 1, np.sqrt(variance), np.nan)

    @cached_property
    def channel_mean(self) -> Array:
        return np.where(self.count > 0, self.mean, np.nan)

    @cached_property
    def channel_std(self) -> Array:
        """*Unbiased*: (S,)."""
        return np.where(self.count > 1, np.sqrt(self.m2 / (self.count - 1)), np.nan)

    @cached_property
    def channel_rms(self) -> Array:
        """Root mean square of each channel: (S,)."""
        return np.sqrt(np.square(self.mean) + self.m2 / np.where(self.count > 0, self.count, np.nan))

    @cached_property
    def outlier_ratio(self) -> Array:
        """Of the largest channel's root mean square to the median channel's: (K,), NaN where that is 0."""
        known = self.total(~np.isnan(self.channel_rms)).astype(np.int64)
        median = np.full(len(self.widths), np.nan)
        for width in np.unique(self.widths):  # rows of one width are a matrix
            rows = np.flatnonzero(self.widths == width)
            ordered = np.sort(self.channel_rms[self.starts[rows, None] + np.arange(width)], axis=1)  # NaN last
            median[rows] = ordered[np.arange(len(rows)), np.maximum(known[rows] - 1, 0) // 2]
        return self.largest(self.channel_rms) / np.where(median > 0, median, np.nan)

    @cached_property
    def kurtosis(self) -> Array:
        """Of the channels' root mean squares s, ``mean(s**4) / mean(s**2)**2``: 1 where all are alike, the number of
        channels where one alone is not 0 (He et al. 2024): (K,)."""
        squares = np.square(self.channel_rms)
        known = self.total(~np.isnan(squares))
        squares = np.nan_to_num(squares)
        return known * self.total(np.square(squares)) / np.square(self.total(squares))

    @cached_property
    def dormant(self) -> Mask:
        """Channels of a root mean square below `DORMANT` of their layer's mean one, none where all are 0: (S,)."""
        usual = (self.total(np.nan_to_num(self.channel_rms)) / self.widths).repeat(self.widths)
        found: Mask = (self.channel_rms <= DORMANT * usual) & (usual > 0)
        return found

    def explodes_as_a_whole(self, limit: float) -> Mask:
        """Return the rows whose largest channel is beyond a limit, and less than `RUNS_AWAY` times as large as the
        median one: (K,)."""
        largest = self.largest(self.channel_rms)
        found: Mask = largest > limit
        for row in np.flatnonzero(found):
            own = self.channel_rms[self.starts[row] : self.starts[row] + self.widths[row]]
            found[row] = largest[row] < RUNS_AWAY * np.nanmedian(own)
        return found

    def of_finite(self, values: Array) -> Array:
        """Return the values of the rows that have a finite value at all, NaN for the others."""
        return np.where(self.n > 0, values, np.nan)


@dataclass(frozen=True)
class Norms:
    """Affine parameters and running statistics of N batch norms, flat."""

    widths: NDArray[np.int64]  # (N,)
    weight: Array | None  # channels of those that have one
    has_weight: Mask  # (N,)
    bias: Array | None
    has_bias: Mask  # (N,)
    drift: Array  # (N, 4), in the order of `registry.DRIFT_STATISTICS`
    drift_z: Array  # (N, 2), of mean and variance, in units of what they are by chance; NaN while that is not known
    settled: Array  # (N, 4), what the 0/1 start does not explain of it
    ran: Mask  # (N,): there is a batch or an evaluation whose drift it is
    below_eps: Array  # (N,), share of the channels whose batch variance is below eps
    young: Mask  # (N,): has seen so few batches that its weights still move fast
    nonfinite: Array  # (N,), channels whose running statistics are not finite
    tracks: Mask  # (N,): has running statistics

    def of_weight(self, reduce: Callable[[Array, NDArray[np.int64]], Array]) -> Array:
        """Return a number of the weights of each norm: (N,), NaN where it has none."""
        return self._reduced(self.weight, self.has_weight, reduce)

    def of_bias(self, reduce: Callable[[Array, NDArray[np.int64]], Array]) -> Array:
        """Return a number of the biases of each norm: (N,), NaN where it has none."""
        return self._reduced(self.bias, self.has_bias, reduce)

    def _reduced(self, flat: Array | None, has: Mask, reduce: Callable[[Array, NDArray[np.int64]], Array]) -> Array:
        found = np.full(len(has), np.nan)
        if flat is not None and has.any():
            widths = self.widths[has]
            found[has] = reduce(flat, np.cumsum(widths) - widths)
        return found


@torch.no_grad()
def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the values of the tensors, all () or all (C,), one after the other: a copy on the device of the first, in
    the widest of their dtypes."""
    if not tensors:
        return torch.empty(0)
    first, dtypes = tensors[0], set(map(_DTYPE, tensors))
    if len(dtypes) > 1 or len(set(map(_DEVICE, tensors))) > 1:
        dtype = max(dtypes, key=lambda each: each.itemsize)
        tensors = [tensor.detach().to(first.device, dtype) for tensor in tensors]
    return torch.stack(list(tensors)) if first.dim() == 0 else torch.cat(list(tensors))


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of any shapes and dtypes to the host, bit for bit, in a single transfer: each would wait for the
    device anew."""
    if not tensors:
        return []
    device = next((tensor.device for tensor in tensors if tensor.numel()), tensors[0].device)
    if device.type == "cpu" and all(tensor.device == device for tensor in tensors):
        return list(tensors)
    of_dtype: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        of_dtype.setdefault(tensor.dtype, []).append(index)
    blocks = [
        torch.cat([tensors[index].detach().to(device).reshape(-1) for index in indices])
        for indices in of_dtype.values()
    ]
    packed = torch.cat([block.view(torch.uint8) for block in blocks]).cpu()
    host = list(tensors)
    parts = packed.split([block.numel() * block.element_size() for block in blocks])
    for part, (dtype, indices) in zip(parts, of_dtype.items(), strict=True):
        # A copy of its own: a view into the middle of the bytes may not be aligned for its dtype.
        pieces = part.clone().view(dtype).split([tensors[index].numel() for index in indices])
        for index, piece in zip(indices, pieces, strict=True):
            host[index] = piece.view(tensors[index].shape)
    return host
