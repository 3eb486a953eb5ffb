"""BN307, and what it is judged by: training batches come sorted if they differ more than random samples of the data
would, and in each epoch alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bn.rules.finding import Fix
from lightning_bn.rules.observer import Observer
from lightning_bn.rules.rule import Occasion, Rule, Seen

MOST_BATCHES = 64
"""Batches of an epoch that are looked at; of a longer one every second, every fourth and so on."""

LEAST_BATCHES = 24

FEATURES = 32
"""Numbers by which a sample is told: means over as many stretches of it."""

UNLIKELY = 3.09
"""Standard deviations of a normal distribution: one in a thousand is beyond."""


class Order(NamedTuple):
    """What two epochs tell of the order of their batches."""

    spread: float
    """``n * between / within``: the variance between the means of batches of n samples, against what it would be of
    random samples, which is 1."""
    likeness: float
    """The correlation of the batches of one epoch with their neighbours in the other; at random it is 0."""
    batches: int
    samples: float
    """In a batch."""

    @property
    def is_sorted(self) -> bool:
        """Whether neither of the two is likely for shuffled data, each at one in a thousand.

        For k batches of n shuffled samples `spread` follows Fisher's F with k - 1 and k (n - 1) degrees of freedom, and
        `likeness` has a standard deviation of ``1 / sqrt(k - 1)``. Both are averages over the features of a sample;
        this makes them less variable where the features are not all the same, so the bounds hold. Both are needed: a
        batch of few classes, drawn at random, as of triplets, has a large spread; and a trend too small to matter may
        be a likeness.
        """
        spread = _normal_of_f(self.spread, self.batches - 1, self.batches * (self.samples - 1))
        return spread > UNLIKELY and self.likeness * math.sqrt(self.batches - 1) > UNLIKELY


class SortedBatches(Rule):
    code = "BN307"
    title = "the training batches are sorted, and come in the same order in each epoch"
    why = "an average of the last batches is then one of the last classes: it fits no evaluation."
    fix = Fix("shuffle=True", "in the training DataLoader")

    def __init__(self) -> None:
        self._order = BatchOrder()

    def begin_epoch(self, at: Occasion) -> None:
        self._order.begin_epoch()

    def begin_batch(self, at: Occasion) -> None:
        look = self._order.begin_batch()
        if look is not None and isinstance(at.observer, Observer):
            at.observer.on_input.append(look)

    def end_epoch(self, at: Occasion) -> Iterator[Seen]:
        order = self._order.found()
        if order is not None and order.is_sorted:
            yield Seen(
                [next(layer.name for layer in at.layers if layer.tracks)],
                f"the means of {order.batches} batches spread {order.spread:.3g} times as much as those of random "
                "samples would, and each is like its neighbour in the epoch before (correlation "
                f"{order.likeness:.2f}).",
            )


class BatchOrder:
    """The first input of the model in the batches of two epochs, as means and variances over its samples.

    The input and not what a layer gets: weights that move would make any two epochs unlike. Samples, which are
    independent where pixels are not, are the unit. Nothing waits for the device before `found`.
    """

    def __init__(self) -> None:
        self._epochs: list[dict[int, tuple[Tensor, int]]] = []
        self._index, self._stride = -1, 1
        self._done = False

    def begin_epoch(self) -> None:
        """A training epoch begins."""
        if not self._done:
            self._epochs = [*self._epochs[-1:], {}]
            self._index, self._stride = -1, 1

    def begin_batch(self) -> Callable[[Tensor], None] | None:
        """A training batch begins; returns what is to be called with the model's input, None if it is not looked at."""
        self._index += 1
        wanted = not self._done and self._epochs and self._index % self._stride == 0
        return self._see if wanted else None

    def _see(self, input: Tensor) -> None:
        row = _moments_of_samples(input)
        if row is None:
            return
        kept = self._epochs[-1]
        kept[self._index] = (row, len(input))
        if len(kept) > MOST_BATCHES:
            self._stride *= 2
            self._epochs[-1] = {index: each for index, each in kept.items() if index % self._stride == 0}

    def found(self) -> Order | None:
        """Return what the last two epochs tell, once; None while they tell nothing. Waits for the device."""
        if self._done or len(self._epochs) < 2:
            return None
        common = sorted(self._epochs[0].keys() & self._epochs[1].keys())
        rows = [[self._epochs[epoch][index][0] for index in common] for epoch in range(2)]
        if len(common) < LEAST_BATCHES or len({row.shape for each in rows for row in each}) > 1:
            return None
        self._done = True
        sizes = torch.tensor([float(self._epochs[0][index][1]) for index in common])
        one, other = (torch.stack(each).double().cpu() for each in rows)
        self._epochs = []
        return _order(one[:, 0], one[:, 1], other[:, 0], sizes)


def _moments_of_samples(input: Tensor) -> Tensor | None:
    """Return mean and *unbiased* variance over the samples of a batch of numbers that tell a sample, (2, features).

    None for one sample, and for what is no image or vector, such as words.
    """
    numbers = input.is_floating_point() or input.dtype == torch.uint8
    if type(input) is not Tensor or not numbers or input.dim() < 2 or len(input) < 2 or input.is_meta:
        return None
    with torch.no_grad():
        flat = input.detach().flatten(1)
        length = max(flat.shape[1] // FEATURES, 1)
        flat = flat[:, : length * FEATURES]
        features = flat.unflatten(1, (-1, length)).mean(2, dtype=torch.float32)
        var, mean = torch.var_mean(features, 0)
        return torch.stack((mean, var))


def _order(means: Tensor, variances: Tensor, next_means: Tensor, sizes: Tensor) -> Order:
    """Compare batches: `means` and `variances` of one epoch, `next_means` of the other, (batches, features) each."""
    between, within = means.var(0), variances.mean(0)
    # In units of each feature's own variance, so that none counts for more by being larger.
    total = between + within
    live = total > 0
    scale = total[live].rsqrt()
    spread = (between[live] / total[live]).sum() / (within[live] / total[live] * (1 / sizes).mean()).sum()
    one, other = ((each - each.mean(0))[:, live] * scale for each in (means, next_means))
    likeness = (one[:-1] * other[1:]).sum() / (one[:-1].norm() * other[1:].norm())
    return Order(float(spread), float(likeness), len(means), float(1 / (1 / sizes).mean()))


def _normal_of_f(f: float, above: float, below: float) -> float:
    """Return what a normal variable is where one that follows F with `above` and `below` degrees of freedom is `f`.

    References:
        Paulson 1942, "An approximate normalization of the analysis of variance distribution"; good to some percent of
        a probability from three degrees of freedom on.
    """
    if not f > 0 or above <= 0 or below <= 0:
        return -math.inf
    a, b, root = 2 / (9 * above), 2 / (9 * below), float(f ** (1 / 3))
    return ((1 - b) * root - (1 - a)) / math.sqrt(b * root**2 + a)
