"""What layers saw over many batches, kept so that their statistics and the standard error can be told at any time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain
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


@dataclass(frozen=True)
class Summary:
    """The sums over some batches from which both estimators and the standard error follow; float64, and merged by
    addition.

    Of one layer, or of several whose channels stand side by side: then what is one number a layer, (), is given per
    channel, (C,).
    """

    moments: Moments
    """Of all the data taken together."""
    within: Tensor
    """(C,), sum over the batches of their own m2; the rest of ``moments.m2`` is the spread between batches."""
    mean_sum: Tensor
    """(C,), sum of the batch means."""
    var_sum: Tensor
    """(C,), sum of the unbiased within-batch variances."""
    batches: Tensor
    """() or (C,), with any data."""
    varied: Tensor
    """() or (C,), batches with at least two values per channel, which alone have an unbiased variance."""
    samples: Tensor
    """() or (C,)"""

    @classmethod
    def of(cls, mean: Tensor, var: Tensor, count: Tensor, samples: Tensor) -> Summary:
        """Sum up over batches: four tensors (batches, C), with a `count` of 0 where there was nothing or it is to be
        left out."""
        seen, varied = count > 0, count > 1
        samples = samples * seen
        # A NaN would survive the weight 0 which a batch that is left out gets.
        mean, var = torch.where(seen, mean, 0.0), torch.where(seen, var, 0.0)
        total = count.sum(0)
        centre = (mean * count).sum(0) / total.clamp(min=1)
        within = (var * count).sum(0)
        between = (torch.where(seen, mean - centre, 0.0).square() * count).sum(0)
        unbiased = var * count / (count - 1).clamp(min=1)
        return cls(
            moments=Moments(total, centre, within + between),
            within=within,
            mean_sum=mean.sum(0),
            var_sum=torch.where(varied, unbiased, 0.0).sum(0),
            batches=seen.sum(0).to(count),
            varied=varied.sum(0).to(count),
            samples=samples.sum(0),
        )

    def merge(self, other: Summary) -> Summary:
        """Return the summary of both sets of batches: `moments` by Chan's formula, and the sums added up."""
        merged = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in merged.items():
            others = getattr(other, name)
            merged[name] = value.merge(others) if isinstance(value, Moments) else value + others
        return Summary(**merged)

    def to(self, device: torch.device) -> Summary:
        """Return the summary on `device`."""
        return self._each(lambda value: value.to(device))

    def clone(self) -> Summary:
        """Return the summary in memory of its own."""
        return self._each(torch.clone)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Summary:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        moments: Moments = parts.pop("moments")
        changed = Moments(change(moments.count), change(moments.mean), change(moments.m2))
        return Summary(moments=changed, **{name: change(value) for name, value in parts.items()})

    def split(self, sizes: Sequence[int]) -> list[Summary]:
        """Return the summary of each layer, of those whose channels stand side by side."""
        first = torch.tensor([0, *accumulate(sizes[:-1])], device=self.within.device)
        each = {name: getattr(self, name).split(sizes) for name in ("within", "mean_sum", "var_sum")}
        each |= {name: getattr(self, name)[first].unbind() for name in ("batches", "varied", "samples")}
        moments = zip(
            self.moments.count[first].unbind(),
            self.moments.mean.split(sizes),
            self.moments.m2.split(sizes),
            strict=True,
        )
        return [
            Summary(Moments(*parts), **dict(zip(each, values, strict=True)))
            for parts, *values in zip(moments, *each.values(), strict=True)
        ]

    @classmethod
    def side_by_side(cls, summaries: Sequence[Summary]) -> Summary:
        """Return the one that `split` makes `summaries` of, each of one layer, on one device."""
        widths = torch.tensor([len(each.within) for each in summaries])
        layer = torch.arange(len(summaries)).repeat_interleave(widths)

        def channels(values: list[Tensor]) -> Tensor:
            return torch.stack(values)[layer] if values[0].dim() == 0 else torch.cat(values)

        moments = zip(*((each.moments.count, each.moments.mean, each.moments.m2) for each in summaries), strict=True)
        others = [each.name for each in fields(cls) if each.name != "moments"]
        each = {name: channels([getattr(summary, name) for summary in summaries]) for name in others}
        return cls(Moments(*(channels(list(values)) for values in moments)), **each)

    def statistics(self, *, pooled: bool) -> tuple[Tensor, Tensor]:
        """Return mean and unbiased variance, (C,): of all the data together, or averaged over the batches."""
        if pooled:
            return self.moments.mean, self.moments.variance(unbiased=True)
        return self.mean_sum / self.batches, self.var_sum / self.varied

    def relative_errors(self, eps: Tensor | float) -> Tensor:
        """Return the squared standard error of the mean in units of ``var + eps``, (C,); see `standard_error`."""
        between = (self.moments.m2 - self.within).clamp(min=0)
        squared = between / (self.moments.count * (self.batches - 1))
        return squared / (self.moments.m2 / self.moments.count + eps)

    def standard_error(self, eps: float) -> Tensor:
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
        self._sizes = list(sizes)
        self._device = device
        # Where the device has no float64, the few numbers a batch go to the host, which has.
        self._home = device if wide_dtype(device) is torch.float64 else torch.device("cpu")
        # (C,), the layer of each channel.
        self._layer = torch.repeat_interleave(torch.tensor(self._sizes)).to(self._home)
        self._pending = pending
        self._blocks: list[Tensor] = []
        self._batches: dict[int, _Batch] = {}
        self._folded: Summary | None = None
        self._finite: list[tuple[list[int], Tensor]] = []

    def add(self, batch: int, place: int, row: BatchMoments) -> None:
        """Take in what the layer at `place` saw in one call in the batch number `batch`; calls in one batch count as
        one batch."""
        if batch not in self._batches:
            if len(self._batches) == self._pending:
                self._fold()
            self._batches[batch] = self._new_batch(len(self._batches))
        self._batches[batch].add(place, row)

    def _new_batch(self, number: int) -> _Batch:
        """Return memory for a row, off a block: small tensors kept between large ones break the heap up, and the model
        waits for pages."""
        # The forward of this batch may run in inference mode, and that of the next one, which is to write here, may
        # not.
        with out_of_inference_mode():
            if number == _BLOCK * len(self._blocks):
                shape = (_BLOCK, 2, sum(self._sizes))
                self._blocks.append(torch.empty(shape, dtype=wide_dtype(self._device), device=self._device))
            row = self._blocks[number // _BLOCK][number % _BLOCK]
            return _Batch(row, row[0].split(self._sizes), row[1].split(self._sizes), [(0, 0)] * len(self._sizes))

    def _fold(self) -> None:
        self._folded, finite = self._summed_up()
        self._finite.append((list(self._batches), finite))
        self._batches = {}

    def _summed_up(self) -> tuple[Summary, Tensor]:
        """Return the sums of all so far, and which of the pending batches were finite at every layer, (k,) bool."""
        batches = list(self._batches.values())
        mean, var = torch.stack([batch.row for batch in batches]).to(self._home).unbind(1)
        numbers = torch.tensor(
            [[*map(float, chain(*batch.numbers))] for batch in batches], dtype=torch.float64, device=self._home
        )
        samples, count = numbers.view(len(batches), -1, 2)[:, self._layer].unbind(2)
        good = var.isfinite() | (count == 0)
        finite = good.all(1)
        if not finite.all():
            count = torch.where(self._by_layer(good)[:, self._layer], count, 0.0)
        latest = Summary.of(mean, var, count, samples)
        return latest if self._folded is None else self._folded.merge(latest), finite

    def _by_layer(self, good: Tensor) -> Tensor:
        """Return whether all channels are good, (k, L): one that is not finite spoils its layer's batch, and no other
        layer's."""
        bad = torch.zeros(len(good), len(self._sizes), dtype=torch.float64, device=self._home)
        return bad.index_add_(1, self._layer, (~good).to(bad)) == 0

    def summary(self) -> Summary | None:
        """Return what all layers have seen so far side by side, None if none of them has seen anything."""
        return self._summed_up()[0] if self._batches else self._folded

    def summary_of(self, place: int) -> Summary | None:
        """Return what the layer at `place` has seen of the pending batches, None if nothing."""
        ran = [batch for batch in self._batches.values() if batch.numbers[place][0]]
        found = [(batch.means[place], batch.vars[place], *batch.numbers[place]) for batch in ran]
        if not found:
            return None
        means, variances, images, values = zip(*found, strict=True)
        mean, var = torch.stack(means).to(self._home), torch.stack(variances).to(self._home)
        samples, count = (
            torch.tensor([[float(n)] for n in each], dtype=torch.float64, device=self._home)
            for each in (images, values)
        )
        count = torch.where(var.isfinite().all(1, keepdim=True), count, 0.0)
        (alone,) = Summary.of(mean, var, count.expand_as(var), samples.expand_as(var)).split([self._sizes[place]])
        return alone

    def close(self) -> tuple[list[Summary | None], set[int]]:
        """Return what each layer has seen, on the CPU, and the numbers of the batches that some layer left out as not
        finite."""
        if self._batches:
            self._fold()
        skipped = {
            batch
            for batches, finite in self._finite
            for batch, good in zip(batches, finite.tolist(), strict=True)
            if not good
        }
        if self._folded is None:
            return [None] * len(self._sizes), skipped
        return list(self._folded.to(torch.device("cpu")).split(self._sizes)), skipped


class _Batch(NamedTuple):
    row: Tensor  # (2, C of all layers): means and biased variances
    means: tuple[Tensor, ...]  # views into it, one a layer
    vars: tuple[Tensor, ...]
    numbers: list[
        tuple[int, int | Tensor]
    ]  # samples and values per channel, one pair a layer; zeros where it did not run

    def add(self, place: int, row: BatchMoments) -> None:
        mean, var = self.means[place], self.vars[place]
        samples, values = self.numbers[place]
        if samples:
            row = BatchMoments(samples, values, mean, var).merge(row)
        mean.copy_(row.mean)
        var.copy_(row.var)
        self.numbers[place] = (row.samples, row.values)
