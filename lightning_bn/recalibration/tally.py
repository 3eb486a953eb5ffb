"""What a layer saw over many batches, kept so that its statistics and their standard error can be told at any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bn.moments import Moments, wide_dtype

__all__ = ["Row", "Summary", "Tally"]

_BLOCK = 32


class Row(NamedTuple):
    """The moments of one batch at one layer."""

    samples: int
    """Length of the first dimension: images, not pixels."""
    values: int | Tensor
    """Values per channel; a tensor where a mask decides."""
    mean: Tensor
    """(C,)"""
    var: Tensor
    """(C,), biased."""

    def merge(self, other: Row) -> Row:
        """Return the row of both taken together: two calls of the layer in one batch."""
        moments = _moments(self).merge(_moments(other))
        return Row(self.samples + other.samples, moments.count, moments.mean, moments.m2 / moments.count.clamp(min=1))


def _moments(row: Row) -> Moments:
    dtype, device = wide_dtype(row.mean.device), row.mean.device
    count = torch.as_tensor(row.values, dtype=dtype, device=device)
    return Moments(count, row.mean.to(dtype), row.var.to(dtype) * count)


@dataclass(frozen=True)
class Summary:
    """The sums over some batches from which both estimators and the standard error follow; float64, and merged by addition."""

    moments: Moments
    """Of all the data taken together."""
    within: Tensor
    """(C,), sum over the batches of their own m2; the rest of ``moments.m2`` is the spread between batches."""
    mean_sum: Tensor
    """(C,), sum of the batch means."""
    var_sum: Tensor
    """(C,), sum of the unbiased within-batch variances."""
    batches: Tensor
    """(), with any data."""
    varied: Tensor
    """(), batches with at least two values per channel, which alone have an unbiased variance."""
    samples: Tensor
    """()"""

    @classmethod
    def of(cls, rows: Sequence[Row], home: torch.device) -> tuple[Summary, Tensor]:
        """Sum up `rows`, one a batch, on `home`; return also which of them were finite, (k,) bool, and so taken in."""
        dtype = torch.float64
        mean = torch.stack([row.mean for row in rows]).to(home, dtype)
        var = torch.stack([row.var for row in rows]).to(home, dtype)
        finite = var.isfinite().all(1)
        count = torch.stack([torch.as_tensor(row.values, dtype=dtype).to(home) for row in rows]) * finite
        samples = torch.tensor([row.samples for row in rows], dtype=dtype).to(home) * finite
        seen, varied = (count > 0).unsqueeze(1), (count > 1).unsqueeze(1)
        # A NaN would survive the weight 0 which a batch that is left out gets.
        mean, var = torch.where(seen, mean, 0.0), torch.where(seen, var, 0.0)
        total, weight = count.sum(), count.unsqueeze(1)
        centre = (mean * weight).sum(0) / total.clamp(min=1)
        within = (var * weight).sum(0)
        between = (torch.where(seen, mean - centre, 0.0).square() * weight).sum(0)
        unbiased = var * weight / (weight - 1).clamp(min=1)
        summary = cls(
            moments=Moments(total, centre, within + between),
            within=within,
            mean_sum=mean.sum(0),
            var_sum=torch.where(varied, unbiased, 0.0).sum(0),
            batches=seen.sum().to(dtype),
            varied=varied.sum().to(dtype),
            samples=samples.sum(),
        )
        return summary, finite

    def merge(self, other: Summary) -> Summary:
        """Return the summary of both sets of batches: `moments` by Chan's formula, and the sums added up."""
        merged = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in merged.items():
            others = getattr(other, name)
            merged[name] = value.merge(others) if isinstance(value, Moments) else value + others
        return Summary(**merged)

    def to(self, device: torch.device) -> Summary:
        """Return the summary on `device`."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        moments: Moments = parts.pop("moments")
        moved = Moments(moments.count.to(device), moments.mean.to(device), moments.m2.to(device))
        return Summary(moments=moved, **{name: value.to(device) for name, value in parts.items()})

    def statistics(self, *, pooled: bool) -> tuple[Tensor, Tensor]:
        """Return mean and unbiased variance, (C,): of all the data together, or averaged over the batches."""
        if pooled:
            return self.moments.mean, self.moments.variance(unbiased=True)
        return self.mean_sum / self.batches, self.var_sum / self.varied

    def standard_error(self, eps: float) -> Tensor:
        """Return the standard error of the mean in units of ``sqrt(var + eps)``, rms over channels: ().

        ``se**2 = sum(n_i * (m_i - m)**2) / (n * (k - 1))`` over the k batches of n_i values and mean m_i: from the spread between batches,
        since the pixels of one image are not independent. NaN for a single batch.
        """
        between = (self.moments.m2 - self.within).clamp(min=0)
        squared = between / (self.moments.count * (self.batches - 1))
        # A batch fewer than two gives 0/0 (NaN) or x/0 (inf): neither is below any tolerance.
        return (squared / (self.moments.m2 / self.moments.count + eps)).mean().sqrt()


class Tally:
    """The rows of one layer, one a batch.

    Args:
        pending: rows that are kept until they are summed up together, which costs little more than to sum up one. None: all of them,
            where calls of different batches may come in any order.
    """

    def __init__(self, pending: int | None) -> None:
        self._pending = pending
        self._rows: dict[int, Row] = {}
        self._slots: list[tuple[Tensor, Tensor]] = []
        self._folded: Summary | None = None
        self._finite: list[tuple[list[int], Tensor]] = []

    def add(self, batch: int, row: Row) -> None:
        """Take in what the layer saw in one call in the batch number `batch`; calls in one batch count as one batch."""
        earlier = self._rows.get(batch)
        if earlier is not None:
            row, slot = earlier.merge(row), (earlier.mean, earlier.var)
        else:
            if len(self._rows) == self._pending:
                self._fold()
            slot = self._slot(len(self._rows), row)
        self._rows[batch] = row._replace(mean=slot[0].copy_(row.mean), var=slot[1].copy_(row.var))

    def _slot(self, number: int, row: Row) -> tuple[Tensor, Tensor]:
        """Return memory for a row, off a block: small tensors kept between large ones break the heap up, and the model waits for pages."""
        if number == len(self._slots):
            # The forward of this batch may run in inference mode, and that of the next one, which is to write here, may not.
            with torch.inference_mode(False):
                block = torch.empty(_BLOCK, 2, len(row.mean), dtype=wide_dtype(row.mean.device), device=row.mean.device)
                self._slots += [(mean, var) for mean, var in block.unbind()]
        return self._slots[number]

    def _fold(self) -> None:
        self._folded, finite = self._summed_up()
        self._finite.append((list(self._rows), finite))
        self._rows = {}

    def _summed_up(self) -> tuple[Summary, Tensor]:
        rows = list(self._rows.values())
        device = rows[0].mean.device
        # Where the device has no float64, the few numbers a batch go to the host, which has.
        home = device if wide_dtype(device) is torch.float64 else torch.device("cpu")
        latest, finite = Summary.of(rows, home)
        return latest if self._folded is None else self._folded.merge(latest), finite

    def summary(self) -> Summary | None:
        """Return what was seen so far, None if nothing."""
        return self._summed_up()[0] if self._rows else self._folded

    def close(self) -> tuple[Summary | None, set[int]]:
        """Return what was seen, on the CPU, and the numbers of the batches that were left out because their moments were not finite."""
        if self._rows:
            self._fold()
        skipped = {batch for batches, finite in self._finite for batch, good in zip(batches, finite.tolist(), strict=True) if not good}
        return None if self._folded is None else self._folded.to(torch.device("cpu")), skipped
