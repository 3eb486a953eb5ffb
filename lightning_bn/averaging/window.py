"""The windowed moving average: exactly the last N training batches, at a cost per step that does not grow with N."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bn.averaging.base import Averaging, Batch
from lightning_bn.moments import Moments, wide_dtype


class Window(Averaging):
    """Statistics of the last ``min(t, size)`` training batches, all with the same weight.

    Args:
        size: length of the window in batches, at least 1. It lags behind the weights like an exponential average of
            momentum ``2 / (size + 1)``.
        pooled: False, the mean of the batch means and the mean of the *unbiased within-batch* variances, each batch
            counted once. True, the mean and the *unbiased pooled* variance of the data of those batches taken together,
            each sample counted once.

    Memory: ``size + 2`` rows of ``2 * num_features`` numbers per layer (3 with `pooled`), float32 (float64 in a float64
        layer).

    Raises:
        ValueError: size is not an integer of at least 1.

    Example:
        >>> from lightning_bn import BatchNorm1d, Window
        >>> layer = BatchNorm1d(1, averaging=Window(2))
        >>> for value in (0.0, 10.0, 20.0):
        ...     _ = layer(torch.tensor([[value - 1], [value + 1]]))
        >>> layer.running_mean, layer.running_var
        (tensor([15.]), tensor([2.]))

    Sums are only ever added up and nothing is subtracted, so nothing drifts and an outlier that has left the window
    leaves no residue. Time is cut into segments of ``size // 2`` batches; a window is a total of the segment that is
    being written (`newest`), of the one before (`middle`), and of the end of the one before that, whose totals over
    suffixes are made one a step, from the back, while the next segment is being written (`turned`): a queue of two
    stacks (Tangwongsan, Hirzel & Schneider 2021, "In-order sliding-window aggregation in worst-case constant time").
    Indices are tensors, one a channel: only the device knows whether a batch was skipped, which must not advance them.
    """

    __module__ = "lightning_bn"

    elementwise = True

    rows: Tensor
    totals: Tensor
    cursor: Tensor

    def __init__(self, size: int = 20, *, pooled: bool = False) -> None:
        super().__init__()
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"Window({size!r}): size is a number of batches, an integer of at least 1, as in Window(20)."
            )
        self.size = size
        self.pooled = pooled

    @property
    def _segment(self) -> int:
        return self.size // 2

    def initial_state(self, num_features: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        if self.size == 1:
            return {}
        numbers = 2 + self.pooled
        return {
            # Two segments, each with a row that stays zero: the total over no batches. A row is (mean, variance), or
            # (count, mean, m2).
            "rows": torch.zeros(2 * (self._segment + 1), numbers, num_features, dtype=dtype, device=device),
            # Totals over `newest`, `middle` and `turned` after the last batch, in the widest dtype: a float32 sum of
            # 1000 rows is off by 1e-6.
            "totals": torch.zeros(3, numbers, num_features, dtype=wide_dtype(device), device=device),
            # Batches seen.
            "cursor": torch.zeros(num_features, dtype=torch.int64, device=device),
        }

    def update(self, running_mean: Tensor, running_var: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.size == 1:
            return batch.mean, batch.var
        segment = self._segment
        phase = self.cursor % (2 * segment)
        here = phase + (phase >= segment)  # past the zero row of the first segment
        # With an odd size the window holds one batch more: the one whose row is overwritten below.
        oldest = here + 1 - self.size % 2
        turning = 2 * segment - here  # as far from the end of the other segment as `here` is from the start of this one
        index = torch.stack((here, oldest, turning)).unsqueeze(1).expand(-1, self.rows.shape[1], -1)
        kept = self.rows.gather(0, index)

        none = self.rows[segment]
        opened = torch.stack((none, self.totals[0], none))  # a segment begins: the newest one has become the middle
        before = torch.where(phase % segment == 0, opened, self.totals)
        row = self._row(batch)
        merged = self._merge(before, torch.cat((row.unsqueeze(0), kept[1:])))
        newest, turned = merged[0], merged[2]
        inside = self._merge(newest, merged[1])

        batch.write(self.totals, torch.stack((newest, before[1], turned)))
        new, old = torch.stack((row, turned)).to(self.rows.dtype), kept[::2]
        self.rows.scatter_(0, index[::2], new if batch.valid is None else torch.where(batch.valid, new, old))
        self.cursor.add_(1 if batch.valid is None else batch.valid)
        return self._statistics(inside, running_mean.dtype)

    def newest_weight(self, step: Tensor, batches: Tensor) -> Tensor | None:
        # A window of one is its newest batch, and keeps no rows.
        return (batches > 0).to(wide_dtype(step.device)) if self.size == 1 else None

    def _row(self, batch: Batch) -> Tensor:
        if not self.pooled:
            return torch.stack((batch.mean, batch.var)).to(self.totals.dtype)
        moments = Moments.from_variance(batch.count.expand_as(batch.mean), batch.mean, batch.var)
        return torch.stack((moments.count, moments.mean, moments.m2)).to(self.totals.dtype)

    def _merge(self, one: Tensor, other: Tensor) -> Tensor:
        if not self.pooled:
            return one + other
        merged = Moments(*one.unbind(-2)).merge(Moments(*other.unbind(-2)))
        return torch.stack((merged.count, merged.mean, merged.m2), -2)

    def _statistics(self, total: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.pooled:
            moments = Moments(*total.unbind())
            return moments.mean.to(dtype), moments.variance(unbiased=True).to(dtype)
        mean, var = (total / self.cursor.clamp(1, self.size)).to(dtype).unbind()
        return mean, var

    @property
    def state_meaning(self) -> str:
        return f"Window({self.extra_repr()})"

    def extra_repr(self) -> str:
        return f"size={self.size}" + ", pooled=True" * self.pooled
