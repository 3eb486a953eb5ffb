"""Copies of running statistics: taken on their device without waiting for it, and compared later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lightning_bn.discovery import BatchNormLayer
from lightning_bn.layers.settlement import rule_of
from lightning_bn.moments import drift
from lightning_bn.sharding import local_value

__all__ = ["Gap", "LayerValues", "Reading", "Values", "gaps", "learned", "ranks_apart", "weight_samples"]

LEAST_UPDATES = 5
"""The statistics of fewer batches are too noisy to be compared with."""


@dataclass(frozen=True)
class LayerValues:
    """The running statistics of one layer, on the host."""

    layer: BatchNormLayer
    mean: Tensor  # (C,)
    var: Tensor  # (C,)
    tracked: int

    @property
    def unsound(self) -> list[int]:
        """Channels whose mean or variance is not finite, or whose variance is negative."""
        bad = ~(self.mean.isfinite() & self.var.isfinite() & (self.var >= 0))
        return [int(channel) for channel in bad.nonzero()]

    @property
    def untouched(self) -> bool:
        """Whether they are the 0/1 that a layer starts with."""
        return bool((self.mean == 0).all() and (self.var == 1).all())

    def equals(self, other: LayerValues) -> bool:
        """Whether mean and variance are the same to the bit."""
        return torch.equal(self.mean, other.mean) and torch.equal(self.var, other.var)


Values = dict[int, LayerValues]
"""By the layer's index among those observed."""


class Reading:
    """The running statistics of `layers` at one moment; a layer that keeps none, or has no buffers yet, is left out.

    Taking it launches a few copies on the device; `values` waits for them.
    """

    @torch.no_grad()
    def __init__(self, layers: Sequence[BatchNormLayer]) -> None:
        self.layers = {index: layer for index, layer in enumerate(layers) if _readable(layer)}
        self._sizes = [layer.module.num_features for layer in self.layers.values()]
        if not self.layers:
            return
        modules = [layer.module for layer in self.layers.values()]
        device = modules[0].running_mean.device
        # At least float32: a difference of two readings is divided by a small number.
        self._statistics = torch.cat(
            [torch.stack((m.running_mean, m.running_var)).to(device, _wide(m.running_mean.dtype)) for m in modules],
            dim=1,
        )
        self._tracked = torch.stack([_count(m).to(device) for m in modules])

    def values(self) -> Values:
        """Return the statistics on the host; waits for the device."""
        if not self.layers:
            return {}
        tracked = self._tracked.tolist()
        parts = self._statistics.cpu().split(self._sizes, dim=1)
        return {
            index: LayerValues(layer, part[0], part[1], count)
            for (index, layer), part, count in zip(self.layers.items(), parts, tracked, strict=True)
        }

    def sound(self) -> bool:
        """Whether every mean and variance is finite and no variance negative; waits for the device, for one bit."""
        if not self.layers:
            return True
        # A NaN fails the comparison too.
        return bool((self._statistics.isfinite().all() & (self._statistics[1] >= 0).all()).item())

    def counts(self) -> dict[int, int]:
        """Return the batches tracked by each layer; waits for the device."""
        return dict(zip(self.layers, self._tracked.tolist(), strict=True)) if self.layers else {}


@dataclass(frozen=True)
class Gap:
    """How far the running statistics of a layer are from those of its latest batches.

    Root mean squares over its channels, with averages of the *unbiased within-batch* variances.
    """

    layer: BatchNormLayer
    shift: float
    """Of ``(mean - running_mean) / sqrt(running_var + eps)``: running standard deviations."""
    log_ratio: float
    """Of ``log((var + eps) / (running_var + eps))``."""
    updates: int
    """How many updates the latest batches are."""
    tracked: int


def gaps(earlier: Reading, now: Reading) -> dict[int, Gap]:
    """Compare the running statistics with the batches that came between two readings, layer by layer; waits for the
    device.

    The latest batches' statistics are in the buffers already (`Averaging.newest_weight`): no forward needs to be
    watched for them. Layers whose average does not tell (a window, a pooled one), with 16-bit buffers, and those that
    hardly moved, are left out.
    """
    before, after = earlier.values(), now.values()
    found = {}
    for index, new in after.items():
        old, module = before.get(index), new.layer.module
        updates = new.tracked - old.tracked if old else 0
        if (
            old is None
            or updates < LEAST_UPDATES
            or module.running_mean.dtype.itemsize < 4
            or new.unsound
            or old.unsound
        ):
            continue
        weight = rule_of(module).newest_weight(torch.tensor(new.tracked), torch.tensor(updates))
        if weight is None or weight == 0:
            continue
        mean, var = (
            a.double() + (b.double() - a.double()) / weight for a, b in ((old.mean, new.mean), (old.var, new.var))
        )
        shift, log_ratio = drift(mean, var, new.mean.double(), new.var.double(), module.eps)
        found[index] = Gap(new.layer, _rms(shift), _rms(log_ratio), updates, new.tracked)
    return found


def ranks_apart(of_ranks: Sequence[dict[int, tuple[Tensor, Tensor]]], eps: float = 1e-5) -> dict[int, float]:
    """Return by how many running deviations the running means differ between ranks, at the layers where statistics
    differ at all.

    Args:
        of_ranks: for each rank the running mean and variance of its layers, (C,) each, on the host.
        eps: what is added to a variance.
    """
    apart: dict[int, float] = {}
    for other in of_ranks[1:]:
        for index, (mean, var) in of_ranks[0].items():
            if index in other and not (torch.equal(mean, other[index][0]) and torch.equal(var, other[index][1])):
                distance = ((mean - other[index][0]) / (var + eps).sqrt()).abs().max().item()
                apart[index] = max(distance, apart.get(index, 0.0))
    return apart


@torch.no_grad()
def weight_samples(model: nn.Module) -> Tensor:
    """Return a few values of each parameter, which differ after an exchange of the weights. Does not wait for the
    device."""
    parameters = [p for p in model.parameters() if p.is_floating_point() and not p.is_meta and not is_lazy(p)]
    samples = [local_value(parameter).reshape(-1)[:8].float() for parameter in parameters]
    return torch.cat([each.to(samples[0].device) for each in samples]) if samples else torch.zeros(0)


def learned(layer: BatchNormLayer) -> bool:
    """Whether the affine parameters differ from channel to channel, both of them: no initialisation does that. Waits
    for the device."""
    if any(p is None or p.is_meta or is_lazy(p) for p in (layer.module.weight, layer.module.bias)):
        return False
    weight, bias = local_value(layer.module.weight), local_value(layer.module.bias)
    if weight.numel() < 2 or bias.numel() < 2:
        return False
    return bool(((weight != weight[0]).any() & (bias != bias[0]).any()).item())


def _rms(values: Tensor) -> float:
    return math.sqrt(values.square().mean().item())


def _readable(layer: BatchNormLayer) -> bool:
    module = layer.module
    if module.running_mean is None or is_lazy(module.running_mean):
        return False
    return not module.running_mean.is_meta


def _count(module: _BatchNorm) -> Tensor:
    if module.num_batches_tracked is None:
        return torch.zeros((), dtype=torch.int64)
    return module.num_batches_tracked


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
