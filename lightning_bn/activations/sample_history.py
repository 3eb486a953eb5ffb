"""What is remembered from sample to sample: which channels have fired, which layers were zero from the start."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_bn.activations.moments_to_pool import Pool, width_of
from lightning_bn.activations.pool_to_host import Array, Mask, pieces


class ChannelHistory:
    """Which channels have fired, and how often, sample after sample.

    A channel is dead where it has been zero at every position since it last fired, and that for so many positions that
    it would have fired `EVIDENCE` times among them at the rate that it had. The rate of one that has never fired is
    not known: it is taken to be that of the layer's other channels, and where these are on or off whatever the input,
    as in squeeze and excitation, one that is off tells nothing. All channels of a layer that gives nothing but zeros
    are dead at once. Fewer than `POSITIONS`, which in a deep layer are much alike, tell nothing of a channel.

    A dead channel counts by itself where a batch norm feeds the layer and the others are `BALANCED`. What a channel is
    given has a mean m and a deviation s, and it fires at the rate at which a normal variable exceeds -m/s. If the
    median of min(rate, 1 - rate) over the channels is 0.3, half of all |m/s| are below 0.52, so m/s varies by 0.78; not
    to fire at 256 positions takes -3.5, which is 4.5 of these: by chance, one channel in 300,000. After a batch norm m
    is 0. Without one, a channel may be off from the start, or for a while as the weights move, as in perceptrons and in
    encoder layers of transformers. Of these the share alone counts.
    """

    EVIDENCE = 20.0
    POSITIONS = 256
    BALANCED = 0.3

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Array, Array]] = {}  # rate at which a channel fires, and silent positions since
        self._newest: tuple[tuple[Any, ...], Array, Array] = ((), np.empty(0), np.empty(0))  # the same, flat, by keys

    def update(self, pool: Pool, silent: Mask, centred: Mask) -> tuple[Mask, Mask, Mask]:
        """Take a sample in, and return which of its channels are dead, which of these count by themselves, and which
        of them have fired before.

        Args:
            pool: the activations.
            silent: which channels were 0 at every position.
            centred: which rows are fed by a batch norm.
        """
        widths = np.array(list(map(width_of, pool.keys)), dtype=np.int64)
        rate, since = self._recall(pool)
        positions = np.repeat(np.array(pool.seen, dtype=np.float64), widths)
        firing = 1 - pool.channels[3].double().numpy() / positions
        # Not above the newest: where a channel fires less and less, the rate that it had tells nothing.
        rate = np.where(silent, rate, np.where(rate > 0, np.minimum((rate + firing) / 2, firing), firing))
        since = np.where(silent, since + positions, 0.0)
        ends = np.cumsum(widths)
        self._newest = pool.keys, rate, since
        wholly = np.logical_and.reduceat(silent, ends - widths).repeat(widths)
        has_fired = rate > 0
        usual = self._usual(rate, widths, rows=np.logical_or.reduceat(silent, ends - widths))
        expected = np.where(has_fired, rate, usual.repeat(widths)) * since
        is_long = (since >= self.POSITIONS) & (expected >= self.EVIDENCE)
        dead = silent & (wholly | is_long)
        return dead, dead & (centred & (usual >= self.BALANCED)).repeat(widths), dead & has_fired

    def _recall(self, pool: Pool) -> tuple[Array, Array]:
        """The rates and the silent positions of the channels of a pool; its keys are as a rule those of the last."""
        keys, rate, since = self._newest
        if keys == pool.keys:
            return rate, since
        widths = [key.width for key in keys]
        self._known.update(zip(keys, zip(pieces(rate, widths), pieces(since, widths), strict=True), strict=True))
        fresh = {key: (np.zeros(key.width), np.zeros(key.width)) for key in pool.keys if key not in self._known}
        known = [self._known.get(key) or fresh[key] for key in pool.keys]
        rate, since = (np.concatenate([pair[part] for pair in known]) for part in (0, 1))
        return rate, since

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
        self._newest = (), np.empty(0), np.empty(0)


class ZeroStart:
    """Which rows have given nothing but zeros since their first sample, at most `EXCUSED` of them: what is initialised
    with zero has moved after a step or two."""

    EXCUSED = 2

    def __init__(self) -> None:
        self._known: dict[Any, int] = {}  # for how many samples a row has been zero since the first; -1: no longer
        self._newest: tuple[tuple[Any, ...], NDArray[np.int64]] = ((), np.empty(0, dtype=np.int64))  # the same, by key

    def update(self, pool: Pool) -> Mask:
        """Take a sample in, and return which of its rows are excused: (K,)."""
        keys, before = self._newest
        if keys != pool.keys:
            self._known.update(zip(keys, before.tolist(), strict=True))
            before = np.array([self._known.get(key, 0) for key in pool.keys], dtype=np.int64)
        low, high, _ = pool.layers.numpy()
        number = np.where((low == 0) & (high == 0) & (before >= 0), before + 1, -1)
        self._newest = pool.keys, number
        found: Mask = (number > 0) & (number <= self.EXCUSED)
        return found
