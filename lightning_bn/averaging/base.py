"""How a stream of batch moments becomes the running statistics of a layer.

Two estimators are offered for every kind of average, chosen by `pooled`:

* ``pooled=False``, Ioffe & Szegedy's (2015, section 3.1) and torch's: the average of the batch means, and the average of the *unbiased
  within-batch* variances, each batch counted once. The spread of the means from batch to batch is in neither.
* ``pooled=True``: the mean and the *unbiased pooled* variance of the data of those batches taken together, each sample counted
  once. It has the spread between batches too.

The two agree for large independent batches and part for small or correlated ones.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bn.averaging.training_state import TrainingState
from lightning_bn.moments import Moments, wide_dtype

__all__ = ["Averaging", "Batch", "Cumulative", "Exponential"]


@dataclass(frozen=True)
class Batch:
    """What an averaging is told about one training batch; its statistics are per channel, and float32 at least."""

    __module__ = "lightning_bn"

    mean: Tensor  # (C,)
    var: Tensor  # (C,), unbiased, within the batch
    count: Tensor  # (), floating: values per channel
    step: Tensor  # (), int64: 1 for the first batch that counts
    valid: Tensor | None  # (), bool: whether the moments are finite; None where nobody asked

    def write(self, target: Tensor, value: Tensor) -> None:
        """Write `value` into `target` in place, unless the batch is to leave no trace; never asks the device which."""
        target.copy_(value if self.valid is None else torch.where(self.valid, value.to(target.dtype), target))


class Averaging(TrainingState, ABC):
    """The rule by which batch moments become running statistics.

    A layer keeps its own copy of the averaging it is given, so one object can configure a whole model.

    To write another, implement `update`. Where the rule needs more than the running statistics and the step number, return its
    tensors from `initial_state`: they become attributes, travel with ``state_dict``, ``.to(device)``, deepcopy and pickle, and stay
    untouched by ``.half()``, DDP broadcasts and weight averaging. Write them with ``batch.write(target, value)``, so that a skipped batch
    leaves them alone.

    Example:
        Polynomial decay averaging (Shamir & Zhang 2013, section 4), in which late batches weigh more:

        >>> import lightning_bn
        >>> class Polynomial(lightning_bn.Averaging):
        ...     def __init__(self, eta=3.0):
        ...         super().__init__()
        ...         self.eta = eta
        ...
        ...     def update(self, running_mean, running_var, batch):
        ...         weight = (self.eta + 1) / (batch.step + self.eta)
        ...         mean = running_mean + weight * (batch.mean - running_mean)
        ...         return mean, running_var + weight * (batch.var - running_var)
        >>> layer = lightning_bn.BatchNorm1d(3, averaging=Polynomial())
        >>> _ = layer(torch.tensor([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]]))
        >>> layer.running_mean
        tensor([1., 2., 3.])
    """

    __module__ = "lightning_bn"

    @abstractmethod
    def update(self, running_mean: Tensor, running_var: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the running statistics after `batch`, as new tensors; called without grad, once per training batch.

        Args:
            running_mean: (C,), before the batch, in the dtype of the batch's moments.
            running_var: (C,), likewise.
            batch: the batch's moments.
        """

    def newest_weight(self, step: Tensor, batches: Tensor) -> Tensor | None:
        """Return how much the newest `batches` batches, taken together, weigh in the running statistics after batch number `step`.

        With this weight a, the mean of their statistics is ``before + (after - before) / a``: a monitor reads from it what the batches were
        like, without a look at the activations. None, as here, where the running statistics don't tell.

        Args:
            step: int64, of any shape; the entries are treated one by one.
            batches: int64, the same shape; the weight of no batches is 0.
        """
        return None

    def newest_batch(self) -> tuple[Tensor, Tensor] | None:
        """Return the mean and the *unbiased* variance of the newest batch, (C,) each, where the private state holds them, else None."""
        return None

    @property
    def kernel_momentum(self) -> float | None:
        """The momentum with which torch's own kernel computes this average in place; None where only `update` can."""
        return None

    def initial_state(self, num_features: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Return the private state for a layer of `num_features` channels, as it is before the first batch: all zeros.

        Args:
            num_features: channels of the layer.
            dtype: of the batches' moments, at least float32.
            device: of the layer.
        """
        return {}

    def for_layer(self, running_mean: Tensor) -> Averaging:
        """Return a copy with fresh private state for the layer whose running mean is `running_mean`."""
        own = copy.deepcopy(self)
        dtype = torch.promote_types(running_mean.dtype, torch.float32)
        own._declare(own.initial_state(running_mean.numel(), dtype, running_mean.device))
        return own


class Exponential(Averaging):
    r"""Exponential moving average: ``running = (1 - momentum) * running + momentum * batch``.

    Args:
        momentum: weight of the new batch, in [0, 1], torch's convention. It remembers about ``2 / momentum - 1`` batches.
        debias: take ``a_t = momentum / (1 - (1 - momentum)**t)`` in place of momentum at the t-th batch, so that the 0/1 which the buffers
            start with never weighs in (Kingma & Ba 2015, section 3). After the first batch the statistics are that batch's.
        pooled: False, the average of the unbiased within-batch variances. True, the unbiased variance of all the data, its samples
            discounted batch by batch: with weights w, ``sum(w * (x - mean)**2) / (V1 - V2 / V1)`` where ``V1 = sum(w)`` and
            ``V2 = sum(w**2)``. What the buffers hold at the start counts as one batch, of the size of the first.

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

    weight_sums: Tensor  # (2,), V1 and V2; only where pooled

    def __init__(self, momentum: float = 0.1, *, debias: bool = False, pooled: bool = False) -> None:
        super().__init__()
        if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum <= 1:
            raise ValueError(
                f"Exponential({momentum!r}): momentum is the weight of the new batch, a number from 0 to 1, as in Exponential(0.1). "
                "For an average in which every batch weighs the same, use Cumulative()."
            )
        # None, for a while, is torch's cumulative average: its update_bn and Lightning's SWA set a layer's momentum so for their pass.
        self.momentum: float | None = momentum
        self.debias = debias
        self.pooled = pooled

    @property
    def kernel_momentum(self) -> float | None:
        return None if self.debias or self.pooled else self.momentum

    def initial_state(self, num_features: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {"weight_sums": torch.zeros(2, dtype=wide_dtype(device), device=device)} if self.pooled else {}

    def update(self, running_mean: Tensor, running_var: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.momentum is None:
            return _cumulate(running_mean, running_var, batch, self.weight_sums if self.pooled else None)
        if not self.pooled:
            weight = self._weight(batch.step) if self.debias else torch.full_like(batch.count, self.momentum)
            return _blend(running_mean, running_var, batch, weight)
        past = self._memory(batch.step - 1) if self.debias else 1.0
        return _pool(running_mean, running_var, batch, self.weight_sums, past, 1 - self.momentum, self.momentum)

    def newest_weight(self, step: Tensor, batches: Tensor) -> Tensor | None:
        if self.pooled:
            return None
        if self.momentum is None:
            return batches / step
        fresh = self._memory(batches)
        return fresh / self._memory(step).clamp(min=1e-12) if self.debias else fresh

    def _memory(self, step: Tensor) -> Tensor:
        """``1 - (1 - momentum)**step``: how much of the average is data after `step` batches."""
        # expm1 and log1p, in the wide dtype: the plain power leaves 6e-5 of the 0/1 start in the first step at momentum 0.001.
        decay = torch.full_like(step, self.momentum, dtype=wide_dtype(step.device)).neg().log1p()
        return torch.where(step == 0, 0.0, -torch.expm1(step * decay))

    def _weight(self, step: Tensor) -> Tensor:
        memory = self._memory(step)
        return self.momentum / torch.where(memory == 0, 1.0, memory)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}" + ", debias=True" * self.debias + ", pooled=True" * self.pooled


class Cumulative(Averaging):
    """Average over all batches since the start: ``running += (batch - running) / t``, torch's ``momentum=None``.

    Unlike torch's it takes t from the device, so it neither waits for it nor breaks a compiled graph.

    Args:
        pooled: False, the average of the unbiased within-batch variances, each batch counted once. True, the unbiased variance of all
            the data taken together, each sample counted once. A plain layer's statistics that are loaded into it count as
            ``num_batches_tracked`` batches of the size of the first one that follows.

    Example:
        >>> from lightning_bn import BatchNorm1d, Cumulative
        >>> layer = BatchNorm1d(1, averaging=Cumulative(pooled=True))
        >>> for batch in ([[1.0], [3.0]], [[5.0], [7.0]]):
        ...     _ = layer(torch.tensor(batch))
        >>> layer.running_mean.item(), round(layer.running_var.item(), 4)
        (4.0, 6.6667)
    """

    __module__ = "lightning_bn"

    weight_sums: Tensor  # (2,), V1 and V2; only where pooled

    def __init__(self, *, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled

    def initial_state(self, num_features: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {"weight_sums": torch.zeros(2, dtype=wide_dtype(device), device=device)} if self.pooled else {}

    def update(self, running_mean: Tensor, running_var: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return _cumulate(running_mean, running_var, batch, self.weight_sums if self.pooled else None)

    def newest_weight(self, step: Tensor, batches: Tensor) -> Tensor | None:
        return None if self.pooled else batches / step

    def extra_repr(self) -> str:
        return "pooled=True" * self.pooled


def _cumulate(running_mean: Tensor, running_var: Tensor, batch: Batch, weight_sums: Tensor | None) -> tuple[Tensor, Tensor]:
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

    `weights` holds V1 and V2, the sums of the samples' weights and of their squares; it is written. While it is empty, the running
    statistics count as `past` batches of this one's size.
    """
    count = batch.count.to(weights.dtype)
    earlier = torch.where(weights[0] == 0, past * count, weights)
    total = torch.stack((keep * earlier[0] + gain * count, keep**2 * earlier[1] + gain**2 * count))
    # m2 = variance * (V1 - V2 / V1) is the reliability-weighted unbiased variance, solved for m2; equal weights give count - 1.
    before = Moments(keep * earlier[0], running_mean, running_var * keep * _freedom(earlier))
    merged = before.merge(Moments(gain * count, batch.mean, batch.var * gain * (count - 1)))
    batch.write(weights, total)
    return merged.mean.to(running_mean.dtype), (merged.m2 / _freedom(total)).to(running_var.dtype)


def _freedom(weights: Tensor) -> Tensor:
    """Degrees of freedom ``V1 - V2 / V1`` of data whose weights sum to V1 and their squares to V2."""
    first, second = weights.unbind()
    return first - second / torch.where(first == 0, 1.0, first)
