"""What one sample measured, on the host and flat: the channels of all rows one behind the other, so that a hundred
layers cost what one does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_bn.activations.pooling import Pool

__all__ = ["Array", "Beginning", "Channels", "Flags", "Mask", "Memory", "Norms", "pieces", "silent_numbers"]

# The largest of many channels of one layer is a few times as large as their median by chance.
RUNS_AWAY = 10.0

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
    is_function: Mask  # (K,): an activation function, or what else a user asked for, but no batch norm
    is_bounded: Mask  # (K,): one whose values have bounds
    is_output: Mask  # (K,): makes what the model returns
    is_input: Mask  # (K,): what the model was given
    has_positions: Mask  # (K,): each channel has several values a sample, as in an image
    dead: Mask  # (S,): has been zero for so long that it won't fire again
    lone: Mask  # (S,): dead, which chance does not explain for a channel by itself

    @classmethod
    def of(cls, pool: Pool, flags: Flags, memory: Memory | None = None) -> Channels:
        """Return what a pool on the host holds, for rows of which the host knows `flags`."""
        widths = np.array([key.width for key in pool.keys], dtype=np.int64)
        count, mean, m2, zeros = pool.channels.double().numpy()
        low, high, saturated = pool.layers.double().numpy()
        positions = np.array(pool.seen, dtype=np.float64)
        silent = zeros == positions.repeat(widths)
        nothing = np.zeros_like(silent)
        dead, lone = (silent, nothing) if memory is None else memory.update(pool, silent)
        return cls(
            *(widths, positions, count, mean, m2, zeros, low, high, saturated),
            *(flags.is_function, flags.is_bounded, flags.is_output, flags.is_input, flags.has_positions),
            *(dead, lone),
        )

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
class Flags:
    """What the host knows of the K rows."""

    is_function: Mask
    is_bounded: Mask
    is_output: Mask
    is_input: Mask
    has_positions: Mask


class Memory:
    """Which channels have fired, and how often, sample after sample.

    A channel is dead where it has been zero at every position since it last fired, and that for so many positions that
    it would have fired `EVIDENCE` times among them at the rate that it had. The rate of one that has never fired is
    not known: it is taken to be that of the layer's other channels, and where these are on or off whatever the input,
    as in squeeze and excitation, one that is off tells nothing. All channels of a layer that gives nothing but zeros
    are dead at once. Fewer than `POSITIONS`, which in a deep layer are much alike, tell nothing of a channel.

    A channel that has never fired counts by itself where the others are `BALANCED`. What a channel is given has a
    mean m and a deviation s, and it fires at the rate at which a normal variable exceeds -m/s. If the median of
    min(rate, 1 - rate) over the channels is 0.3, half of all |m/s| are below 0.52, so m/s varies by 0.78; not to fire
    at 256 positions takes -3.5, which is 4.5 of these: by chance, one channel in 300,000. After a batch norm m is 0. A
    fresh layer without one may have channels that are off from the start, and its share of them alone counts.
    """

    EVIDENCE = 20.0
    POSITIONS = 256
    BALANCED = 0.3

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Array, Array]] = {}  # rate at which a channel fires, and silent positions since

    def update(self, pool: Pool, silent: Mask) -> tuple[Mask, Mask]:
        """Take a sample in, and return which of its channels are dead, and which of these count by themselves."""
        widths = np.array([key.width for key in pool.keys], dtype=np.int64)
        fresh = {key: (np.zeros(key.width), np.zeros(key.width)) for key in pool.keys if key not in self._known}
        known = [self._known.get(key) or fresh[key] for key in pool.keys]
        rate, since = (np.concatenate([pair[part] for pair in known]) for part in (0, 1))
        positions = np.repeat(np.array(pool.seen, dtype=np.float64), widths)
        firing = 1 - pool.channels[3].double().numpy() / positions
        rate = np.where(silent, rate, np.where(rate > 0, (rate + firing) / 2, firing))
        since = np.where(silent, since + positions, 0.0)
        ends = np.cumsum(widths)
        known = list(zip(pieces(rate, widths), pieces(since, widths), strict=True))
        self._known.update(zip(pool.keys, known, strict=True))
        wholly = np.logical_and.reduceat(silent, ends - widths).repeat(widths)
        has_fired = rate > 0
        usual = self._usual(rate, widths, rows=np.logical_or.reduceat(silent & ~has_fired, ends - widths))
        expected = np.where(has_fired, rate, usual.repeat(widths)) * since
        is_long = (since >= self.POSITIONS) & (expected >= self.EVIDENCE)
        dead = silent & (wholly | is_long)
        return dead, dead & (has_fired | (usual >= self.BALANCED).repeat(widths))

    def _usual(self, rate: Array, widths: NDArray[np.int64], rows: Mask) -> Array:
        """By row, how often one of two things that a channel can do is done, the rarer: the median over those that
        have fired, 0 where none has or nobody asks."""
        found = np.zeros(len(widths))
        starts = np.cumsum(widths) - widths
        for row in np.flatnonzero(rows):
            own = rate[starts[row] : starts[row] + widths[row]]
            if (fired := own[own > 0]).size:
                found[row] = np.median(np.minimum(fired, 1 - fired))
        return found

    def clear(self) -> None:
        """Forget all: an evaluation begins."""
        self._known.clear()


class Beginning:
    """Which rows have given nothing but zeros since their first sample, at most `EXCUSED` of them: what is initialised
    with zero has moved after a step or two."""

    EXCUSED = 2

    def __init__(self) -> None:
        self._samples: dict[Any, int] = {}  # by row, how many samples it has been zero for since the first

    def update(self, pool: Pool) -> Mask:
        """Take a sample in, and return which of its rows are excused: (K,)."""
        low, high, _ = pool.layers.numpy()
        zero = (low == 0) & (high == 0)
        for key, is_zero in zip(pool.keys, zero.tolist(), strict=True):
            before = self._samples.get(key, 0)
            self._samples[key] = before + 1 if is_zero and before >= 0 else -1
        number = np.array([self._samples[key] for key in pool.keys])
        found: Mask = (number > 0) & (number <= self.EXCUSED)
        return found


@dataclass(frozen=True)
class Norms:
    """Affine parameters and running statistics of N batch norms, flat."""

    widths: NDArray[np.int64]  # (N,)
    weight: Array | None  # channels of those that have one
    has_weight: Mask  # (N,)
    bias: Array | None
    has_bias: Mask  # (N,)
    drift: Array  # (N, 4), in the order of `registry.DRIFT_STATISTICS`
    settled: Array  # (N, 4), what the 0/1 start does not explain of it
    ran: Mask  # (N,): there is a batch or an evaluation whose drift it is
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
