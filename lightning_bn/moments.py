"""Count, mean and centred second moment of data, per channel; merged without ever subtracting a square from a
square."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype of a device: float64, or float32 where the device has none (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Moments:
    """The moments of some data, per channel.

    ``mean = sum(x) / count``, ``m2 = sum((x - mean)**2)``.

    Two of them merge into the moments of the data taken together, whatever their sizes and in any order, with the
    formula of Chan, Golub and LeVeque (1979, "Updating formulae and a pairwise algorithm for computing sample
    variances", eq. 2.1). It never forms ``E[x**2] - E[x]**2``, which in float32 gives variance 0 for data with mean
    1000 and standard deviation 0.01.

    Example:
        >>> data = torch.tensor([[1.0], [2.0], [6.0]])
        >>> whole, parts = Moments.of(data), Moments.of(data[:1]).merge(Moments.of(data[1:]))
        >>> whole.mean.item(), parts.mean.item()
        (3.0, 3.0)
        >>> whole.variance(unbiased=True).item(), parts.variance(unbiased=True).item()
        (7.0, 7.0)
    """

    count: Tensor  # (), floating: values per channel
    mean: Tensor  # (C,)
    m2: Tensor  # (C,), sum of squared deviations from the mean

    @classmethod
    def of(cls, data: Tensor, mask: Tensor | None = None, *, wide: bool = False) -> Moments:
        """Return the moments of `data` per channel, in at least float32.

        Args:
            data: (N, C, *spatial).
            mask: boolean (N, *spatial), True where a position counts; None counts all.
            wide: give them in the widest dtype of the device: a mean in float32 is too coarse to be merged where it is
                1e5 times the standard deviation.

        Returns:
            Moments with `mean` and `m2` of shape (C,), differentiable with respect to `data`. Of no values at all:
            zeros.
        """
        data = data.to(torch.promote_types(data.dtype, torch.float32))
        over = [dim for dim in range(data.dim()) if dim != 1]
        if mask is None:
            positions = data.numel() // max(data.shape[1], 1)
            count = torch.full((), positions, dtype=data.dtype, device=data.device)
            kept = None
        else:
            count = mask.sum().to(data.dtype)
            kept = mask.unsqueeze(1)
            data = torch.where(kept, data, 0.0)
        mean = data.sum(over) / count.clamp(min=1)
        centred = data - mean.reshape(1, -1, *[1] * (data.dim() - 2))
        if kept is not None:
            centred = torch.where(kept, centred, 0.0)
        # The mean was rounded: far from zero by so much that its square shows in m2. What is left of the mean tells by
        # how much.
        rest = centred.sum(over) / count.clamp(min=1)
        dtype = wide_dtype(data.device) if wide else data.dtype
        return cls(
            count.to(dtype),
            mean.to(dtype) + rest,
            (centred.square().sum(over) - rest.square() * count).clamp(min=0).to(dtype),
        )

    @classmethod
    def from_variance(cls, count: Tensor, mean: Tensor, var: Tensor) -> Moments:
        """Return the moments of `count` values per channel whose mean and *unbiased* variance are known."""
        return cls(count, mean, var * (count - 1).clamp(min=0))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both data taken together; symmetric up to rounding, and empty moments are the
        identity."""
        count = self.count + other.count
        share = other.count / count.clamp(min=torch.finfo(count.dtype).tiny)  # no data has no share
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * share,
            self.m2 + other.m2 + delta.square() * (self.count * share),
        )

    def variance(self, *, unbiased: bool) -> Tensor:
        """Return ``m2 / (count - 1)`` where unbiased, else ``m2 / count``; NaN where there are too few values for
        it."""
        return self.m2 / (self.count - 1 if unbiased else self.count).clamp(min=0)

    def to_row(self) -> Tensor:
        """Return count, mean and m2 one after the other: (2 C + 1,)."""
        return torch.cat((self.count.reshape(1), self.mean, self.m2))

    @classmethod
    def from_row(cls, row: Tensor) -> Moments:
        """Return the moments that `to_row` laid out as `row`."""
        mean, m2 = row[1:].chunk(2)
        return cls(row[:1], mean, m2)

    def detach(self) -> Moments:
        """Return the same moments, cut off from the graph they were computed in."""
        return Moments(self.count.detach(), self.mean.detach(), self.m2.detach())

    def wide(self) -> Moments:
        """Return the moments in the widest dtype that their device has, in which long sums should be kept."""
        dtype = wide_dtype(self.mean.device)
        return Moments(self.count.to(dtype), self.mean.to(dtype), self.m2.to(dtype))


def statistics_shift(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, eps: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return, per channel, the shift of the mean in running standard deviations and the natural log of the ratio of the
    variances.

    ``(mean - running_mean) / sqrt(running_var + eps)`` and ``log((var + eps) / (running_var + eps))``, with *unbiased*
    variances.
    """
    running = running_var + eps
    return (mean - running_mean) / running.sqrt(), ((var.clamp(min=0) + eps) / running).log()
