"""What the activations of one layer are like: their scale, how many are zero, dead, saturated or not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_bn.activations.tensor_to_moments import bucket_counts, histogram_edges, moments_of, read
from lightning_bn.moments import Moments, wide_dtype


class ActivationStats(Metric):
    r"""Statistics of a layer's activations, exact over any number of batches, in any order, and over all ranks.

    With n finite values x of the layer in all, from all batches and channels:

    * ``mean = sum(x) / n`` and ``std = sqrt(sum((x - mean)**2) / (n - 1))``, the *unbiased pooled* estimate: centred
      moments per channel are merged by Chan, Golub and LeVeque's formula (1979, eq. 2.1), in float64 where the device
      has it;
    * ``abs_max = max(abs(x))``;
    * ``zero_fraction``: share of the values, finite or not, that are exactly 0;
    * ``dead_fraction``: share of the *channels* that were 0 at every position of every input. Sparse is not dead: a
      ReLU whose every channel fires for some inputs has a zero fraction of one half and a dead fraction of 0;
    * ``saturated_fraction``: share of the values within 2.5 % of the range of `bounds` from either bound, where the
      slope of a sigmoid or a tanh is below a tenth of its largest; only with `bounds`;
    * ``nonfinite``: number of NaN and infinite values, which are in none of the moments;
    * ``channel_mean``, ``channel_std``: the same mean and (unbiased) standard deviation per channel;
    * ``histogram``: number of finite values in each bucket between `histogram_edges`; only with ``histogram=True``.

    Args:
        num_channels: C, size of the channel dimension.
        channel_dim: which dimension of an activation holds the channels: 1 as in (N, C, H, W), -1 as in (N, L, C).
        bounds: the least and the greatest value that the layer can give: (0, 1) for a sigmoid, (-1, 1) for a tanh.
            None: it has none.
        histogram: whether to count into buckets too.
        **kwargs: torchmetrics' own, such as ``sync_on_compute``.

    Shape:
        - update: (N, C, *spatial), or what `channel_dim` says, of any floating dtype; N may be 0. (N,) counts as (N,
          1).
        - compute: scalars (), but ``channel_mean`` and ``channel_std`` (C,), which torchmetrics gives as () where C is
          1, and ``histogram`` (len(histogram_edges()) + 1,). A statistic of too few values is NaN.

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

    options: Tensor  # (3,), widest floating dtype: channel_dim and bounds, which never change
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
            raise ValueError(
                f"ActivationStats({num_channels}, bounds={bounds!r}): bounds are (least, greatest), as in (0.0, 1.0)."
            )
        self.num_channels = num_channels
        self.channel_dim = channel_dim
        self.bounds = bounds
        self.histogram = histogram
        dtype = wide_dtype(torch.get_default_device())
        # A MetricCollection shares the states of metrics whose states are equal after a batch: these tell them apart.
        options = torch.tensor([channel_dim, *(bounds or (0.0, 0.0))], dtype=dtype)
        self.add_state("options", options, dist_reduce_fx="max")
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
        data = by_channel(activation.detach(), self.num_channels, self.channel_dim)
        if data.numel() == 0:
            return
        (reading,) = read([data], bounds=self.bounds)
        moments = moments_of(reading)
        self.moments = _stack(_moments(self.moments).merge(moments))
        self.abs_max = torch.maximum(self.abs_max, reading.extremes.abs().max())
        self.seen = self.seen + reading.positions
        if reading.zeros is not None:
            self.zeros = self.zeros + reading.zeros.to(torch.int64)
        if reading.count is not None:
            self.nonfinite = self.nonfinite + (reading.positions - reading.count.flatten())
        if reading.saturated is not None:
            self.saturated = self.saturated + reading.saturated.squeeze()
        if self.histogram:
            self.buckets = self.buckets + bucket_counts(data)

    def compute(self) -> dict[str, Tensor]:
        """Return the statistics of all that was taken in, by name."""
        state = self.metric_state
        return _summarise({name: value for name, value in state.items() if isinstance(value, Tensor)})

    def plot(self, val: Mapping[str, Tensor] | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw the mean and the standard deviation of each channel, with the layer's shares as the title.

        Args:
            val: what `compute` returned; None: its result now.
            ax: matplotlib's axes to draw into; None: new ones.

        Returns:
            The figure and the axes, as of torchmetrics' metrics.
        """
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure().subplots()
        _draw_channels(self.compute() if val is None else val, ax)
        return ax.figure, ax


def _draw_channels(values: Mapping[str, Tensor], axes: Any) -> None:
    mean, std = (values[name].reshape(-1).double().cpu().numpy() for name in ("channel_mean", "channel_std"))
    axes.errorbar(range(len(mean)), mean, yerr=std, fmt="o", markersize=3, linewidth=0.5)
    axes.set_xlabel("channel")
    axes.set_ylabel("mean, with the standard deviation")
    names = ("zero_fraction", "dead_fraction", "saturated_fraction", "nonfinite")
    axes.set_title(", ".join(f"{name} {values[name].item():.3g}" for name in names if name in values), fontsize=9)


def by_channel(activation: Tensor, num_channels: int, channel_dim: int) -> Tensor:
    """Return the activation as (N, C, *spatial), without a copy where that can be.

    Raises:
        ValueError: another number of channels.
        TypeError: not floating point.
    """
    if not activation.is_floating_point():
        raise TypeError(
            f"update(activation of dtype {activation.dtype}): activations are floating point; pass activation.float()."
        )
    if activation.dim() < 2:
        activation = activation.reshape(-1, 1)
    dims = activation.dim()
    if not -dims <= channel_dim < dims or activation.shape[channel_dim] != num_channels:
        raise ValueError(
            f"update(activation of shape {tuple(activation.shape)}): there are no {num_channels} channels in dimension "
            f"{channel_dim}. Build one ActivationStats(num_channels) a layer, with channel_dim=-1 where the channels "
            "come last."
        )
    if channel_dim % dims == 1:
        return activation
    return (
        activation.reshape(-1, num_channels) if channel_dim % dims == dims - 1 else activation.movedim(channel_dim, 1)
    )


def _summarise(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `ActivationStats.compute` does, from its state."""
    channels = _moments(state["moments"])
    layer = _pooled_over_channels(channels)
    total = (state["seen"] * len(state["zeros"])).to(channels.mean.dtype)
    values = {
        "mean": torch.where(layer.count > 0, layer.mean, torch.nan),
        "std": _unbiased_std(layer),
        "abs_max": torch.where(layer.count > 0, state["abs_max"], torch.nan),
        "zero_fraction": state["zeros"].sum() / total,
        "dead_fraction": torch.where(total > 0, _dead_channels(state).to(total.dtype).mean(), torch.nan),
        "nonfinite": state["nonfinite"].sum(),
        "channel_mean": torch.where(channels.count > 0, channels.mean, torch.nan),
        "channel_std": _unbiased_std(channels),
    }
    if "saturated" in state:
        values["saturated_fraction"] = state["saturated"] / total
    if "buckets" in state:
        values["histogram"] = state["buckets"]
    return values


def _dead_channels(state: Mapping[str, Tensor]) -> Tensor:
    """Return whether each channel was zero at every position of every input: (C,) bool, False where nothing was
    seen."""
    return (state["zeros"] == state["seen"]) & (state["seen"] > 0)


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
