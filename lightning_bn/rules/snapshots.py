"""Whether statistics and weights have moved: copies, taken on their device without waiting for it and compared later;
and how often tensors were written, which autograd counts on the host."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lightning_bn.buffers import running_mean
from lightning_bn.discovery import BatchNormLayer
from lightning_bn.set_in_use import sets_of
from lightning_bn.sharding import local_value
from lightning_bn.torch_internals import buffers_of, side_by_side

_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class LayerValues:
    """The running statistics of one layer, on the host."""

    layer: BatchNormLayer
    mean: Tensor  # (C,); of a layer with several sets of statistics, all of them, one behind the other
    var: Tensor  # likewise
    tracked: int

    @property
    def unsound(self) -> list[int]:
        """Channels whose mean or variance is not finite, or whose variance is negative."""
        bad = ~(self.mean.isfinite() & self.var.isfinite() & (self.var >= 0))
        return [int(channel) for channel in bad.nonzero()]

    @property
    def untouched(self) -> bool:
        """Whether they are the 0/1 that a layer starts with."""
        return self.initial == "mean is 0 and variance 1"

    @property
    def initial(self) -> str:
        """Which of them is what a layer starts with, in words; the empty string where both differ from it."""
        mean, var = bool((self.mean == 0).all()), bool((self.var == 1).all())
        return "mean is 0 and variance 1" if mean and var else "mean is 0" * mean + "variance is 1" * var

    def equals(self, other: LayerValues) -> bool:
        """Whether mean and variance are bit-identical."""
        return torch.equal(self.mean, other.mean) and torch.equal(self.var, other.var)


Values = dict[int, LayerValues]
"""By the layer's index among those observed."""


class StatisticsSnapshot:
    """The running statistics of `layers` at one moment; a layer that keeps none, or has no buffers yet, is left out.

    Taking it launches a few copies on the device; `values` waits for them.
    """

    @torch.no_grad()
    def __init__(self, layers: Sequence[BatchNormLayer]) -> None:
        self.layers = {index: layer for index, layer in enumerate(layers) if _readable(layer)}
        self._sizes = [running_mean(layer.module).numel() for layer in self.layers.values()]
        if not self.layers:
            return
        modules = [layer.module for layer in self.layers.values()]
        device = running_mean(modules[0]).device
        self._statistics = torch.stack([_flat([getattr(m, name) for m in modules], device) for name in _STATISTICS])
        none = torch.zeros((), dtype=torch.int64)
        counts = [none if m.num_batches_tracked is None else m.num_batches_tracked for m in modules]
        self._tracked = torch.stack([count.to(device) for count in counts])

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


def waiting_sets(layers: Sequence[BatchNormLayer]) -> dict[str, list[BatchNormLayer]]:
    """Return, by the name of each set of statistics that is not in place, the layers as they would be in it, as far as
    a `StatisticsSnapshot` reads them; named as the monitor names them: ``bn1@night``."""
    found: dict[str, list[BatchNormLayer]] = {}
    for layer in layers:
        sets = sets_of(layer.module)
        for name, holder in {} if sets is None else sets.waiting(layer.module).items():
            part = BatchNormLayer((f"{layer.name}@{name}",), cast(_BatchNorm, holder), layer.around)
            found.setdefault(name, []).append(part)
    return found


class WeightSamples:
    """A few values of each parameter of `model`, which differ after an exchange of the weights. Making one does not
    wait for the device."""

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        parameters = [p for p in model.parameters() if p.is_floating_point() and not p.is_meta and not is_lazy(p)]
        here = [local_value(parameter).reshape(-1) for parameter in parameters]
        self._sizes = [len(part) for part in here]
        samples = [part[:8].float() for part in here]
        self._values = torch.cat([each.to(samples[0].device) for each in samples]) if samples else torch.zeros(0)

    def differ(self, other: WeightSamples) -> bool:
        """Tell whether any parameter has other values; waits for the device. One that is sharded is compared where the
        same part of it was here both times: behind a forward it may be whole for a while."""
        own, theirs = self._parts(), other._parts()
        pairs = zip(self._sizes, other._sizes, own, theirs, strict=False)
        return any(size == other_size and not torch.equal(one, two) for size, other_size, one, two in pairs)

    def _parts(self) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = self._values.cpu().split([min(size, 8) for size in self._sizes])
        return parts


def learned(layer: BatchNormLayer) -> bool:
    """Whether the affine parameters differ from channel to channel, both of them: no initialisation does that. Waits
    for the device."""
    if any(p is None or p.is_meta or is_lazy(p) for p in (layer.module.weight, layer.module.bias)):
        return False
    weight, bias = local_value(layer.module.weight), local_value(layer.module.bias)
    if weight.numel() < 2 or bias.numel() < 2:
        return False
    return bool(((weight != weight[0]).any() & (bias != bias[0]).any()).item())


def _readable(layer: BatchNormLayer) -> bool:
    mean = layer.module.running_mean
    return mean is not None and not is_lazy(mean) and not mean.is_meta


def _flat(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return tensors one behind the other, in at least float32: a difference of two readings is divided by a small
    number."""
    if len({(tensor.dtype, tensor.device) for tensor in tensors}) > 1:
        tensors = [tensor.to(device, _wide(tensor.dtype)) for tensor in tensors]
    flat = side_by_side(tensors)
    return flat.to(device, _wide(flat.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def unsure(layers: Iterable[BatchNormLayer]) -> set[int]:
    """Return the indices of the layers with a forward of their own, which may move their statistics and count
    nothing."""
    known = ("torch.", "lightning_bn.")
    return {
        index
        for index, layer in enumerate(layers)
        # A layer that `BatchNormSync` synchronises has a forward that runs its class's.
        if not getattr(vars(layer.module).get("forward"), "follows_class", "forward" not in vars(layer.module))
        or not type(layer.module).forward.__module__.startswith(known)
    }


def writes(modules: Sequence[nn.Module], unsure: Collection[int]) -> list[int]:
    """Return how often a forward counted its batch in each of `modules`; for those in `unsure`, how often any of their
    statistics were written. On the host."""
    # The dicts are asked for anew: of a layer whose statistics are on their way from other ranks it is another one.
    all_buffers = [buffers_of(module) for module in modules]
    counts = versions(all_buffers, "num_batches_tracked")
    for index in unsure:
        for name in ("running_mean", "running_var"):
            counts[index] += version(all_buffers[index].get(name)) or 0
    return counts


def version(tensor: Tensor | None) -> int | None:
    """How often the tensor was written; None where that is not kept: there is no tensor, or it was made in inference
    mode."""
    try:
        return None if tensor is None else tensor._version
    except (
        RuntimeError
    ):  # asked for only where it fails: `is_inference` of every layer would cost more than the version
        return None


def versions(named: Iterable[Mapping[str, Tensor | None]], name: str) -> list[int]:
    """Return how often the tensors called `name` were written, by the fastest way there is: it is asked for all layers
    at each step. 0 where there is no tensor, or it keeps no count."""
    try:
        return [0 if (tensor := each.get(name)) is None else tensor._version for each in named]
    except RuntimeError:  # some were made in inference mode
        return [version(each.get(name)) or 0 for each in named]
