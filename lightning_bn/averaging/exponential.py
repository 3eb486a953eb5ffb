"""Exponential and cumulative averages of the batches."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bn.averaging.base import Averaging, Batch
from lightning_bn.moments import Moments, wide_dtype


class Exponential(Averaging):
    r"""Exponential moving average: ``running = (1 - momentum) * running + momentum * batch``.

    Args:
        momentum: weight of the new batch, in [0, 1], torch's convention. It remembers about ``2 / momentum - 1``
            batches.
        debias: take ``a_t = momentum / (1 - (1 - momentum)**t)`` in place of momentum at the t-th batch, so that the
            0/1 which the buffers start with never weighs in (Kingma & Ba 2015, section 3). After the first batch the
            statistics are that batch's.
        pooled: False, the average of the unbiased within-batch variances. True, the unbiased variance of all the data,
            its samples discounted batch by batch: with weights w, ``sum(w * (x - mean)**2) / (V1 - V2 / V1)`` where
            ``V1 = sum(w)`` and ``V2 = sum(w**2)``. What the buffers hold at the start counts as one batch, of the size
            of the first.

    Raises:
        ValueError: momentum outside [0, 1].

    Example:
        >>> from lightning_bn import BatchNorm1d, Exponential
        >>> layer = BatchNorm1d(1, averaging=Exponential(0.1, debias=True))
        >>> _ = layer(torch.tensor([[4.0], [6.0]]))
        >>> layer.running_mean, layer.running_var
        (tensor([5.]), tensor([2.]))
    """

    __module__ = "lightning_bn"

    elementwise = True

    weight_sums: Tensor  # (2, C), V1 and V2; only where pooled

    def __init__(self, momentum: float = 0.1, *, debias: bool = False, pooled: bool = False) -> None:
        super().__init__()
        if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum <= 1:
            raise ValueError(
                f"Exponential({momentum!r}): momentum is the weight of the new batch, a number from 0 to 1, as in "
                "Exponential(0.1). For an average in which every batch weighs the same, use Cumulative()."
            )
        # None, for a while, is torch's cumulative average: its update_bn and Lightning's SWA set a layer's momentum so
        # for their pass.
        self.momentum: float | None = momentum
        self.debias = debias
        self.pooled = pooled

    @property
    def by_momentum(self) -> bool:
        return not self.debias and not self.pooled

    @property
    def kernel_momentum(self) -> float | None:
        return self.momentum if self.by_momentum else None

    def initial_state(self, num_features: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return _weight_sums(num_features, device) if self.pooled else {}

    def update(self, running_mean: Tensor, running_var: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        momentum = self.momentum
        if momentum is None:
            return _cumulate(running_mean, running_var, batch, self.weight_sums if self.pooled else None)
        if not self.pooled:
            if not self.debias:
                return _blend(running_mean, running_var, batch, torch.full_like(batch.count, momentum))
            memory = _memory(batch.step, momentum)  # divided by it, the start never weighs in
            return _blend(running_mean, running_var, batch, momentum / torch.where(memory == 0, 1.0, memory))
        past = _memory(batch.step - 1, momentum) if self.debias else 1.0
        return _pool(running_mean, running_var, batch, self.weight_sums, past, 1 - momentum, momentum)

    def newest_weight(self, step: Tensor, batches: Tensor) -> Tensor | None:
        if self.pooled:
            return None
        if self.momentum is None:
            return batches / step
        fresh = _memory(batches, self.momentum)
        return fresh / _memory(step, self.momentum).clamp(min=1e-12) if self.debias else fresh

    @property
    def state_meaning(self) -> str:
        return "Exponential(pooled=True)"  # the momentum may change from batch to batch

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}" + ", debias=True" * self.debias + ", pooled=True" * self.pooled


class Cumulative(Averaging):
    """Average over all batches since the start: ``running += (batch - running) / t``, torch's ``momentum=None``.

    Unlike torch's it takes t from the device, so it neither waits for it nor breaks a compiled graph.

    Args:
        pooled: False, the average of the unbiased within-batch variances, each batch counted once. True, the unbiased
            variance of all the data taken together, each sample counted once. A plain layer's statistics that are
            loaded into it count as ``num_batches_tracked`` batches of the size of the first one that follows.

    Example:
        >>> from lightning_bn import BatchNorm1d, Cumulative
        >>> layer = BatchNorm1d(1, averaging=Cumulative(pooled=True))
        >>> for batch in ([[1.0], [3.0]], [[5.0], [7.0]]):
        ...     _ = layer(torch.tensor(batch))
        >>> layer.running_mean.item(), round(layer.running_var.item(), 4)
        (4.0, 6.6667)
    """

    __module__ = "lightning_bn"

    elementwise = True

    weight_sums: Tensor  # (2, C), V1 and V2; only where pooled

    def __init__(self, *, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled

    def initial_state(self, num_features: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return _weight_sums(num_features, device) if self.pooled else {}

    def update(self, running_mean: Tensor, running_var: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return _cumulate(running_mean, running_var, batch, self.weight_sums if self.pooled else None)

    def newest_weight(self, step: Tensor, batches: Tensor) -> Tensor | None:
        return None if self.pooled else batches / step

    @property
    def state_meaning(self) -> str:
        return "Cumulative(pooled=True)"

    def extra_repr(self) -> str:
        return "pooled=True" * self.pooled


def _weight_sums(num_features: int, device: torch.device) -> dict[str, Tensor]:
    return {"weight_sums": torch.zeros(2, num_features, dtype=wide_dtype(device), device=device)}


def _cumulate(
    running_mean: Tensor, running_var: Tensor, batch: Batch, weight_sums: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Average over all batches, each counted once, or where there are `weight_sums` over all samples."""
    if weight_sums is not None:
        return _pool(running_mean, running_var, batch, weight_sums, batch.step - 1, 1.0, 1.0)
    return _blend(running_mean, running_var, batch, batch.step.to(wide_dtype(batch.step.device)).reciprocal())


def _blend(running_mean: Tensor, running_var: Tensor, batch: Batch, weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.to(running_mean.dtype)
    return running_mean.lerp(batch.mean, weight), running_var.lerp(batch.var, weight)


def _pool(
    running_mean: Tensor,
    running_var: Tensor,
    batch: Batch,
    weights: Tensor,
    past: Tensor | float,
    keep: float,
    gain: float,
) -> tuple[Tensor, Tensor]:
    """Merge the batch's samples, weighted by `gain`, with all earlier ones, discounted by `keep`.

    `weights`, (2, C), holds V1 and V2, the sums of the samples' weights and of their squares; it is written. While it
    is empty, the running statistics count as `past` batches of this one's size.
    """
    count = batch.count.to(weights.dtype).expand_as(weights[0])
    earlier = torch.where(weights[0] == 0, past * count, weights)
    total = torch.stack((keep * earlier[0] + gain * count, keep**2 * earlier[1] + gain**2 * count))
    # m2 = variance * (V1 - V2 / V1) is the reliability-weighted unbiased variance, solved for m2; equal weights give
    # count - 1.
    before = Moments(keep * earlier[0], running_mean, running_var * keep * _freedom(earlier))
    merged = before.merge(Moments(gain * count, batch.mean, batch.var * gain * (count - 1)))
    batch.write(weights, total)
    # No weight at all is no data: with momentum 0 and debias the statistics stay what they are.
    moved = total[0] > 0
    mean, var = (
        torch.where(moved, merged.mean, running_mean),
        torch.where(moved, merged.m2 / _freedom(total), running_var),
    )
    return mean.to(running_mean.dtype), var.to(running_var.dtype)


def _freedom(weights: Tensor) -> Tensor:
    """Degrees of freedom ``V1 - V2 / V1`` of data whose weights sum to V1 and their squares to V2."""
    first, second = weights.unbind()
    return first - second / torch.where(first == 0, 1.0, first)


def _memory(step: Tensor, momentum: float) -> Tensor:
    """``1 - (1 - momentum)**step``: how much of an exponential average is data after `step` batches."""
    # expm1 and log1p, in the wide dtype: the plain power leaves 6e-5 of the 0/1 start in the first step at momentum
    # 0.001.
    decay = torch.full_like(step, momentum, dtype=wide_dtype(step.device)).neg().log1p()
    return torch.where(step == 0, 0.0, -torch.expm1(step * decay))
