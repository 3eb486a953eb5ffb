"""What layers saw over many batches, kept so that their statistics and the standard error can be told at any time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bn.modes import out_of_inference_mode
from lightning_bn.moments import Moments, wide_dtype

_BLOCK = 32


class BatchMoments(NamedTuple):
    """The moments of one batch at one layer."""

    samples: int
    """Length of the first dimension: images, not pixels."""
    values: int | Tensor
    """Values per channel; a tensor where a mask decides."""
    mean: Tensor
    """(C,)"""
    var: Tensor
    """(C,), biased."""

    def merge(self, other: BatchMoments) -> BatchMoments:
        """Return the row of both taken together: two calls of the layer in one batch."""
        moments = _moments(self).merge(_moments(other))
        return BatchMoments(
            self.samples + other.samples, moments.count, moments.mean, moments.m2 / moments.count.clamp(min=1)
        )


def _moments(row: BatchMoments) -> Moments:
    dtype, device = wide_dtype(row.mean.device), row.mean.device
    count = torch.as_tensor(row.values, dtype=dtype, device=device)
    return Moments(count, row.mean.to(dtype), row.var.to(dtype) * count)


class Summary(NamedTuple):
    """The sums over some batches from which both estimators and the standard error follow: (C,) each, float64, and
    merged by addition. Of one layer, or of several whose channels stand side by side."""

    values: Tensor
    mean: Tensor
    m2: Tensor
    """With the two before, the moments of all the data taken together."""
    within: Tensor
    """Sum over the batches of their own m2; the rest of `m2` is the spread between batches."""
    mean_sum: Tensor
    """Sum of the batch means."""
    var_sum: Tensor
    """Sum of the unbiased within-batch variances."""
    batches: Tensor
    """With any data."""
    varied: Tensor
    """Batches with at least two values per channel, which alone have an unbiased variance."""
    samples: Tensor

    @classmethod
    def of(cls, mean: Tensor, var: Tensor, count: Tensor, samples: Tensor) -> Summary:
        """Sum up over batches: four tensors (batches, C), with a `count` of 0 where there was nothing or it is to be
        left out."""
        seen, varied = count > 0, count > 1
        # A NaN would survive the weight 0 which a batch that is left out gets.
        mean, var = torch.where(seen, mean, 0.0), torch.where(seen, var, 0.0)
        total = count.sum(0)
        centre = (mean * count).sum(0) / total.clamp(min=1)
        squares = var * count
        within = squares.sum(0)
        between = (torch.where(seen, mean - centre, 0.0).square() * count).sum(0)
        unbiased = squares / (count - 1).clamp(min=1)
        return cls(
            total,
            centre,
            within + between,
            within,
            mean.sum(0),
            torch.where(varied, unbiased, 0.0).sum(0),
            seen.sum(0).to(count),
            varied.sum(0).to(count),
            (samples * seen).sum(0),
        )

    @classmethod
    def of_nothing(cls, channels: int, device: torch.device) -> Summary:
        """Return the summary of no batches, which merges into any other as it is."""
        return cls(*torch.zeros(len(cls._fields), channels, dtype=torch.float64, device=device))

    def merge(self, other: Summary) -> Summary:
        """Return the summary of both sets of batches: the moments by Chan's formula, and the sums added up."""
        merged = Moments(*self[:3]).merge(Moments(*other[:3]))
        return Summary(merged.count, merged.mean, merged.m2, *map(torch.add, self[3:], other[3:]))

    def to(self, device: torch.device) -> Summary:
        """Return the summary on `device`."""
        return Summary(*(each.to(device) for each in self))

    def split(self, sizes: Sequence[int]) -> list[Summary]:
        """Return the summary of each layer, of those whose channels stand side by side."""
        return [Summary(*parts) for parts in zip(*(each.split(sizes) for each in self), strict=True)]

    @classmethod
    def side_by_side(cls, summaries: Iterable[Summary]) -> Summary:
        """Return the one that `split` makes `summaries` of."""
        return cls(*map(torch.cat, zip(*summaries, strict=True)))

    def statistics(self, *, pooled: bool) -> tuple[Tensor, Tensor]:
        """Return mean and unbiased variance, (C,): of all the data together, or averaged over the batches."""
        if pooled:
            return self.mean, Moments(*self[:3]).variance(unbiased=True)
        return self.mean_sum / self.batches, self.var_sum / self.varied

    def relative_errors(self, eps: Tensor | float) -> Tensor:
        """Return the squared standard error of the mean in units of ``var + eps``, (C,); see `standard_error`."""
        between = (self.m2 - self.within).clamp(min=0)
        squared = between / (self.values * (self.batches - 1))
        return squared / (self.m2 / self.values + eps)

    def standard_error(self, eps: Tensor | float) -> Tensor:
        """Return the standard error of the mean in units of ``sqrt(var + eps)``, rms over channels: ().

        ``se**2 = sum(n_i * (m_i - m)**2) / (n * (k - 1))`` over the k batches of n_i values and mean m_i: from the
        spread between batches, since the pixels of one image are not independent. NaN for a single batch.
        """
        # A batch fewer than two gives 0/0 (NaN) or x/0 (inf): neither is below any tolerance.
        return self.relative_errors(eps).mean().sqrt()


class Tally:
    """The rows of layers on one device, one row a batch in which the channels of all stand side by side.

    Args:
        sizes: the layers' numbers of channels.
        device: where the rows are kept.
        pending: batches that are kept until they are summed up together, which costs little more than to sum up one.
            None: all of them, where calls of different batches may come in any order.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device, pending: int | None) -> None:
        self.sizes = list(sizes)
        self._device = device
        # Where the device has no float64, the few numbers a batch go to the host, which has.
        self._home = device if wide_dtype(device) is torch.float64 else torch.device("cpu")
        # (C,), the layer of each channel.
        self._layer = torch.arange(len(sizes)).repeat_interleave(torch.tensor(self.sizes)).to(self._home)
        self._pending = pending
        self._blocks: list[Tensor] = []
        self._batches: dict[int, _Batch] = {}
        self._sums = Summary.of_nothing(sum(sizes), self._home)
        self._finite: list[tuple[list[int], Tensor]] = []

    def add(self, batch: int, place: int, row: BatchMoments) -> None:
        """Take in what the layer at `place` saw in one call in the batch number `batch`; calls in one batch count as
        one batch."""
        if (found := self._batches.get(batch)) is None:
            if len(self._batches) == self._pending:
                self._fold()
            found = self._batches[batch] = self._new_batch(len(self._batches))
        mean, var = found.means[place], found.vars[place]
        if found.samples[place]:
            row = BatchMoments(found.samples[place], found.values[place], mean, var).merge(row)
        mean.copy_(row.mean)
        var.copy_(row.var)
        found.samples[place], found.values[place] = row.samples, row.values

    def _new_batch(self, number: int) -> _Batch:
        """Return memory for a row, off a block: small tensors kept between large ones break the heap up, and the model
        waits for pages."""
        # The forward of this batch may run in inference mode, and that of the next one, which is to write here, may
        # not.
        with out_of_inference_mode():
            if number == _BLOCK * len(self._blocks):
                shape = (_BLOCK, 2, sum(self.sizes))
                self._blocks.append(torch.empty(shape, dtype=wide_dtype(self._device), device=self._device))
            row = self._blocks[number // _BLOCK][number % _BLOCK]
            nothing = [0] * len(self.sizes)
            return _Batch(row, row[0].split(self.sizes), row[1].split(self.sizes), [*nothing], [*nothing])

    def _fold(self) -> None:
        self._sums, finite = self._summed_up()
        self._finite.append((list(self._batches), finite))
        self._batches = {}

    def _summed_up(self) -> tuple[Summary, Tensor]:
        """Return the sums of all so far, and which of the pending batches were finite at every layer, (k,) bool."""
        batches = list(self._batches.values())
        mean, var = torch.stack([batch.row for batch in batches]).to(self._home).unbind(1)
        samples, count = self._numbers(chain.from_iterable((each.samples, each.values) for each in batches))
        good = var.isfinite() | (count == 0)
        finite = good.all(1)
        if not finite.all():
            count = torch.where(self._by_layer(good)[:, self._layer], count, 0.0)
        return self._sums.merge(Summary.of(mean, var, count, samples)), finite

    def _numbers(self, numbers: Iterable[Sequence[int | Tensor]]) -> tuple[Tensor, Tensor]:
        """Return samples and values, (k, C) each, of two lists a batch with one number a layer."""
        rows = torch.tensor([list(map(float, row)) for row in numbers], dtype=torch.float64, device=self._home)
        by_channel = rows[:, self._layer]
        return by_channel[::2], by_channel[1::2]

    def _by_layer(self, good: Tensor) -> Tensor:
        """Return whether all channels are good, (k, L): one that is not finite spoils its layer's batch, and no other
        layer's."""
        bad = torch.zeros(len(good), len(self.sizes), dtype=torch.float64, device=self._home)
        return bad.index_add_(1, self._layer, (~good).to(bad)) == 0

    def summary(self) -> Summary:
        """Return what all layers have seen so far, side by side."""
        return self._summed_up()[0] if self._batches else self._sums

    def summary_of(self, place: int) -> Summary | None:
        """Return what the layer at `place` has seen of the pending batches, None if nothing."""
        ran = [batch for batch in self._batches.values() if batch.samples[place]]
        if not ran:
            return None
        mean = torch.stack([batch.means[place] for batch in ran]).to(self._home)
        var = torch.stack([batch.vars[place] for batch in ran]).to(self._home)
        numbers = [[float(batch.samples[place]), float(batch.values[place])] for batch in ran]
        samples, count = torch.tensor(numbers, dtype=torch.float64, device=self._home).unsqueeze(1).unbind(2)
        count = torch.where(var.isfinite().all(1, keepdim=True), count, 0.0)
        return Summary.of(mean, var, count.expand_as(var), samples.expand_as(var))

    def close(self) -> tuple[Summary, set[int]]:
        """Return what all layers have seen, side by side on the CPU, and the numbers of the batches that some layer
        left out as not finite."""
        if self._batches:
            self._fold()
        rows = (zip(batches, finite.tolist(), strict=True) for batches, finite in self._finite)
        return self._sums.to(torch.device("cpu")), {batch for row in rows for batch, good in row if not good}


class _Batch(NamedTuple):
    row: Tensor  # (2, C of all layers): means and biased variances
    means: tuple[Tensor, ...]  # views into it, one a layer
    vars: tuple[Tensor, ...]
    samples: list[int]  # one a layer, as of what follows; zero where it did not run
    values: list[int | Tensor]  # per channel
