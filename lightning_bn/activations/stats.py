"""What the activations of one layer are like: their scale, how many are zero, dead, saturated or not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_bn.channel_moments import channel_moments
from lightning_bn.moments import Moments, wide_dtype

__all__ = ["ActivationStats", "dead_channels", "histogram_edges", "merge_states", "summarise"]

# A sigmoid's slope within this share of its range from either bound is below a tenth of its largest; a tanh's likewise.
SATURATION_MARGIN = 0.025


class ActivationStats(Metric):
    r"""Statistics of a layer's activations, exact over any number of batches, in any order, and over all ranks.

    With n finite values x of the layer in all, from all batches and channels:

    * ``mean = sum(x) / n`` and ``std = sqrt(sum((x - mean)**2) / (n - 1))``, the *unbiased pooled* estimate: centred moments per channel
      are merged by Chan, Golub and LeVeque's formula (1979, eq. 2.1), in float64 where the device has it;
    * ``abs_max = max(abs(x))``;
    * ``zero_fraction``: share of the values, finite or not, that are exactly 0;
    * ``dead_fraction``: share of the *channels* that were 0 at every position of every input. Sparse is not dead: a ReLU whose every
      channel fires for some inputs has a zero fraction of one half and a dead fraction of 0;
    * ``saturated_fraction``: share of the values within 2.5 % of the range of `bounds` from either bound, where the slope of a sigmoid or
      a tanh is below a tenth of its largest; only with `bounds`;
    * ``nonfinite``: number of NaN and infinite values, which are in none of the moments;
    * ``channel_mean``, ``channel_std``: the same mean and (unbiased) standard deviation per channel;
    * ``histogram``: number of finite values in each bucket between `histogram_edges`; only with ``histogram=True``.

    Args:
        num_channels: C, size of the channel dimension.
        channel_dim: which dimension of an activation holds the channels: 1 as in (N, C, H, W), -1 as in (N, L, C).
        bounds: the least and the greatest value that the layer can give: (0, 1) for a sigmoid, (-1, 1) for a tanh. None: it has none.
        histogram: whether to count into buckets too.
        **kwargs: torchmetrics' own, such as ``sync_on_compute``.

    Shape:
        - update: (N, C, *spatial), or what `channel_dim` says, of any floating dtype; N may be 0. (N,) counts as (N, 1).
        - compute: scalars (), but ``channel_mean`` and ``channel_std`` (C,), which torchmetrics gives as () where C is 1, and ``histogram``
          (len(histogram_edges()) + 1,). A statistic of too few values is NaN.

    Raises:
        ValueError: fewer than one channel; bounds that are not increasing.

    Example:
        >>> import torch
        >>> from lightning_bn import ActivationStats
        >>> stats = ActivationStats(num_channels=2)
        >>> stats.update(torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
        >>> stats.update(torch.tensor([[0.0, float("nan")]]))
        >>> values = stats.compute()
        >>> values["mean"].item(), values["dead_fraction"].item(), values["nonfinite"].item()
        (0.8, 0.5, 1)
    """

    __module__ = "lightning_bn"

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    moments: Tensor  # (3, C), widest floating dtype: count, mean and m2 of the finite values
    seen: Tensor  # (), int64: values per channel, finite or not
    zeros: Tensor  # (C,), int64
    nonfinite: Tensor  # (C,), int64
    abs_max: Tensor  # (), widest floating dtype
    saturated: Tensor  # (), int64; only with bounds
    buckets: Tensor  # (B + 1,), int64; only with histogram

    def __init__(
        self,
        num_channels: int,
        *,
        channel_dim: int = 1,
        bounds: tuple[float, float] | None = None,
        histogram: bool = False,
        **kwargs: Any,
    ) -> None:
        # torchmetrics keeps a computed value through merge_state, which would hide what was merged.
        super().__init__(**{"compute_with_cache": False, **kwargs})
        if num_channels < 1:
            raise ValueError(f"ActivationStats({num_channels!r}): num_channels is the number of channels, at least 1.")
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"ActivationStats({num_channels}, bounds={bounds!r}): bounds are (least, greatest), as in (0.0, 1.0).")
        self.num_channels = num_channels
        self.channel_dim = channel_dim
        self.bounds = bounds
        self.histogram = histogram
        dtype = wide_dtype(torch.get_default_device())
        integers = torch.zeros(num_channels, dtype=torch.int64)
        self.add_state("moments", torch.zeros(3, num_channels, dtype=dtype), dist_reduce_fx=_merge_ranks)
        self.add_state("seen", integers.sum(), dist_reduce_fx="sum")
        self.add_state("zeros", integers.clone(), dist_reduce_fx="sum")
        self.add_state("nonfinite", integers.clone(), dist_reduce_fx="sum")
        self.add_state("abs_max", torch.zeros((), dtype=dtype), dist_reduce_fx="max")
        if bounds is not None:
            self.add_state("saturated", integers.sum(), dist_reduce_fx="sum")
        if histogram:
            self.add_state("buckets", torch.zeros(len(histogram_edges()) + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, activation: Tensor) -> None:
        """Take the activations of one batch in; nothing on this path waits for an accelerator.

        Raises:
            ValueError: another number of channels.
            TypeError: not floating point.
        """
        data = self._by_channel(activation.detach())
        if data.numel() == 0:
            return
        positions = data.numel() // self.num_channels
        moments, abs_max = _finite_moments(data)
        self.moments = _stack(_moments(self.moments).merge(moments))
        self.abs_max = torch.maximum(self.abs_max, abs_max)
        self.seen = self.seen + positions
        self.zeros = self.zeros + _count_zeros(data)
        self.nonfinite = self.nonfinite + (positions - moments.count).to(torch.int64)
        if self.bounds is not None:
            margin = SATURATION_MARGIN * (self.bounds[1] - self.bounds[0])
            self.saturated = self.saturated + ((data <= self.bounds[0] + margin) | (data >= self.bounds[1] - margin)).sum()
        if self.histogram:
            self.buckets = self.buckets + _bucket_counts(data)

    def compute(self) -> dict[str, Tensor]:
        """Return the statistics of all that was taken in, by name."""
        return summarise(self.metric_state)

    def _by_channel(self, activation: Tensor) -> Tensor:
        """The activation as (N, C, *spatial), without a copy where that can be."""
        if not activation.is_floating_point():
            raise TypeError(f"update(activation of dtype {activation.dtype}): activations are floating point; pass activation.float().")
        if activation.dim() < 2:
            activation = activation.reshape(-1, 1)
        dim = self.channel_dim
        if not -activation.dim() <= dim < activation.dim() or activation.shape[dim] != self.num_channels:
            raise ValueError(
                f"update(activation of shape {tuple(activation.shape)}): there are no {self.num_channels} channels in dimension {dim}. "
                f"Build one ActivationStats(num_channels) a layer, with channel_dim=-1 where the channels come last."
            )
        if dim % activation.dim() == activation.dim() - 1:
            return activation.reshape(-1, self.num_channels)
        return activation.movedim(dim, 1)


def summarise(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `ActivationStats.compute` does, from its state."""
    channels = _moments(state["moments"])
    layer = _pooled_over_channels(channels)
    total = (state["seen"] * len(state["zeros"])).to(channels.mean.dtype)
    values = {
        "mean": torch.where(layer.count > 0, layer.mean, torch.nan),
        "std": _unbiased_std(layer),
        "abs_max": torch.where(layer.count > 0, state["abs_max"], torch.nan),
        "zero_fraction": state["zeros"].sum() / total,
        "dead_fraction": torch.where(total > 0, dead_channels(state).to(total.dtype).mean(), torch.nan),
        "nonfinite": state["nonfinite"].sum(),
        "channel_mean": torch.where(channels.count > 0, channels.mean, torch.nan),
        "channel_std": _unbiased_std(channels),
    }
    if "saturated" in state:
        values["saturated_fraction"] = state["saturated"] / total
    if "buckets" in state:
        values["histogram"] = state["buckets"]
    return values


def dead_channels(state: Mapping[str, Tensor]) -> Tensor:
    """Return whether each channel was zero at every position of every input: (C,) bool, False where nothing was seen."""
    return (state["zeros"] == state["seen"]) & (state["seen"] > 0)


def merge_states(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of two `ActivationStats` taken together."""
    merged = {name: one[name] + other[name] for name in one}
    merged["moments"] = _merge_ranks(torch.stack((one["moments"], other["moments"])))
    merged["abs_max"] = torch.maximum(one["abs_max"], other["abs_max"])
    return merged


def histogram_edges() -> Tensor:
    """Return the edges between the buckets of `ActivationStats`, ascending: ``+-2**(k / 4)`` from 2**-16 to 2**16 and 0 between them."""
    positive = torch.exp2(torch.arange(-64, 65, dtype=torch.float64) / 4)
    return torch.cat((-positive.flip(0), positive))


def _over(data: Tensor) -> list[int]:
    """All dimensions of (N, C, *spatial) but the channels'."""
    return [dim for dim in range(data.dim()) if dim != 1]


def _count_zeros(data: Tensor) -> Tensor:
    """How many values are exactly 0, per channel: (C,) int64."""
    # Comparing straight into float32 and adding up takes a third of the time of counting bools, and is exact up to 2**24.
    dtype = torch.float32 if data.numel() // data.shape[1] < 2**24 else torch.float64
    return torch.eq(data, 0, out=torch.empty_like(data, dtype=dtype)).sum(_over(data)).to(torch.int64)


def _finite_moments(data: Tensor) -> tuple[Moments, Tensor]:
    """Moments of the finite values per channel, all three of shape (C,), and their greatest absolute value; in the widest dtype."""
    if _may_look(data):
        mean, biased = channel_moments(data)
        if biased.isfinite().all():
            count = torch.full_like(mean, data.numel() // data.shape[1], dtype=torch.float64)
            low, high = data.aminmax()
            return Moments(count, mean.double(), biased.double() * count), torch.maximum(-low, high).double()
    # Wide from the start: the square of an exploding float32 overflows from 1.8e19 on.
    wide = data.to(wide_dtype(data.device))
    finite = wide.isfinite()
    wide = torch.where(finite, wide, 0.0)
    count = finite.sum(_over(data)).to(wide.dtype)
    mean = wide.sum(_over(data)) / count.clamp(min=1)
    centred = torch.where(finite, wide - mean.reshape(1, -1, *[1] * (data.dim() - 2)), 0.0)
    return Moments(count, mean, centred.square().sum(_over(data))), wide.abs().amax()


def _may_look(data: Tensor) -> bool:
    """Whether a branch on a value costs nothing: anywhere but on the CPU it waits for the device."""
    return data.device.type == "cpu"


def _bucket_counts(data: Tensor) -> Tensor:
    edges = histogram_edges().to(device=data.device, dtype=torch.promote_types(data.dtype, torch.float32))
    index = torch.bucketize(data.to(edges.dtype), edges).flatten()
    # Unlike bincount and histc, adding in place needs no value from the device.
    counts = torch.zeros(len(edges) + 1, dtype=torch.int64, device=data.device)
    return counts.index_add_(0, index, data.isfinite().flatten().to(torch.int64))


def _pooled_over_channels(channels: Moments) -> Moments:
    count = channels.count.sum()
    mean = (channels.count * channels.mean).sum() / count.clamp(min=1)
    between = (channels.count * (channels.mean - mean).square()).sum()
    return Moments(count, mean, channels.m2.sum() + between)


def _unbiased_std(moments: Moments) -> Tensor:
    return torch.where(moments.count > 1, moments.variance(unbiased=True), torch.nan).sqrt()


def _merge_ranks(stacked: Tensor) -> Tensor:
    """Merge states (W, 3, C) of W ranks into one, (3, C)."""
    merged = _moments(stacked[0])
    for state in stacked[1:]:
        merged = merged.merge(_moments(state))
    return _stack(merged)


def _moments(state: Tensor) -> Moments:
    return Moments(*state.unbind())


def _stack(moments: Moments) -> Tensor:
    return torch.stack((moments.count, moments.mean, moments.m2))
