"""Statistics of many layers at once: hooks only while they are wanted, and one transfer to the host for all layers
together."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.activations.drift import DriftMeter, summarise_drift
from lightning_bn.activations.layers import bounds_of
from lightning_bn.activations.pooling import Key, Pool, flatten, merge
from lightning_bn.activations.reading import Reading, bucket_counts, read
from lightning_bn.activations.registry import COLUMNS, DRIFT_STATISTICS
from lightning_bn.activations.stats import by_channel
from lightning_bn.activations.summary import Summary, summarise, weights_and_biases
from lightning_bn.discovery import BatchNormLayer
from lightning_bn.modes import eager
from lightning_bn.moments import drift
from lightning_bn.ranks.collective import share
from lightning_bn.sharding import full_value
from lightning_bn.torch_internals import in_backward

__all__ = ["LayerCollector", "Sample", "to_host"]

# A layer may be called with activations of several widths, as torchvision's Bottleneck does with its ReLU. More than
# these are no widths but lengths: the channels are in another dimension.
MAX_WIDTHS = 8

# Channels whose readings wait to be put together: a validation has many batches, a training step is below this.
MAX_WAITING = 2**20


@dataclass
class Sample:
    """What `LayerCollector.collect` found."""

    rows: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """By layer, in forward order, a value for each of `COLUMNS`; None where it does not apply."""
    channels: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By layer, mean and unbiased standard deviation of each channel, (C,) float64."""
    histograms: dict[str, Tensor] = field(default_factory=dict)
    """By layer, counts in the buckets of `activations.histogram_edges`."""


class LayerCollector:
    """Statistics of the layers' activations, drift and parameters, from `attach` to `collect`.

    Between `attach` and `detach` a forward hook on each layer takes its output in; both can be called any number of
    times before `collect`, which gives one sample of all that was seen and starts the next. A layer that is called
    several times is pooled over all its calls; where these differ in the number of channels, each number has a row:
    ``relu``, ``relu[256]``. Of an output that is a tuple, list or dict the first floating-point tensor counts. A
    forward that activation checkpointing repeats is not a second sample. Compiled modules run eagerly while hooks are
    attached, since compiled code has none.

    Args:
        model: which holds the layers.
        layers: by name, as from `layers.select_layers`.
        training: whether drift is that of training batches, from the buffers, or that of the inputs that an evaluation
            sees.
        activations: whether to place hooks at all. False: drift and affine parameters only.
        gradients: whether to look at the gradients at the layers' outputs too.
        histograms: names of the layers to count into buckets.
        channel_dim: which dimension holds the channels, but a batch norm's, whose channels are in dimension 1.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        *,
        training: bool = True,
        activations: bool = True,
        gradients: bool = False,
        histograms: Collection[str] = (),
        channel_dim: int = 1,
    ) -> None:
        self.layers = dict(layers)
        self._model = model
        self._training = training
        self._activations = activations
        self._gradients = gradients
        self._histograms = frozenset(histograms)
        self._channel_dim = channel_dim
        self._norms = {name: layer for name, layer in self.layers.items() if isinstance(layer, _BatchNorm)}
        self._tracking = {
            name: layer
            for name, layer in self._norms.items()
            if BatchNormLayer((name,), layer).tracks and layer.num_batches_tracked is not None
        }
        self._meter: DriftMeter | None = None
        self._observed = frozenset(self._tracking)
        self._is_open = False
        self._readings: list[tuple[Key, Reading]] = []
        self._waiting = 0  # channels in them
        self._pool: Pool | None = None  # of the readings before these
        self._counts: dict[Key, Tensor] = {}  # in the buckets of a histogram
        self._widths: dict[tuple[str, str], set[int]] = {}
        self._order: dict[str, None] = {}  # names in the order of their first call
        self._dead: dict[Key, NDArray[np.bool_]] = {}
        self._left_out: set[str] = set()
        self._attached = ExitStack()
        self._is_attached = False

    def attach(self) -> None:
        """Place the hooks; the first time since `collect`, drift begins to count."""
        self.detach()
        if not self._is_open:
            self._open()
        self._is_attached = True
        if not self._activations:
            return
        for name, layer in self.layers.items():
            self._attached.callback(layer.register_forward_hook(partial(self._see, name)).remove)
        self._attached.enter_context(eager(self._model))

    def _open(self) -> None:
        self._is_open = True
        if not self._training:
            return
        if self._meter is None:  # built now, when the model has come to its device
            self._meter = DriftMeter(list(self._tracking.values()))
            names = list(self._tracking)
            self._observed = frozenset(names[index] for index in self._meter.unreadable())
        self._meter.start()

    def detach(self) -> None:
        """Remove the hooks."""
        self._is_attached = False
        self._attached.close()

    def begin_epoch(self) -> None:
        """Let every channel count as alive until it is seen dead again."""
        self._dead.clear()

    def unseen(self) -> list[str]:
        """Return the layers that no forward has reached so far."""
        return [name for name in self.layers if name not in self._order] if self._activations else []

    def collect(self) -> Sample:
        """Return the sample, the same on every rank, and forget it; every rank must call this."""
        measured = self.measure()
        host = to_host(measured)
        pool = None if self._pool is None else self._pool.on(*host[:2])
        histograms = dict(zip(self._counts, host[2:], strict=False))
        drifts, weights, biases, means, variances = host[-5:]
        # As objects, since a layer may have run on one rank alone.
        ranks = share((pool, histograms, (drifts, weights, biases, means, variances), list(self._order)))
        self._order = dict.fromkeys(name for *_, order in ranks for name in order)
        pools = [pool for pool, *_ in ranks if pool is not None]
        counts: dict[Key, Tensor] = {}
        for _, found, *_ in ranks:
            for key, values in found.items():
                counts[key] = counts[key] + values if key in counts else values
        # Each rank's layers see their own batches; the buffers of the first are the ones that are broadcast and saved.
        sample = self._sample(summarise(merge(pools)) if pools else {}, counts, *ranks[0][2])
        self._readings, self._waiting, self._pool, self._counts = [], 0, None, {}
        self._is_open = False
        return sample

    def close(self) -> None:
        """Remove the hooks, and whatever else was placed; a sample that was begun is given up."""
        self.detach()
        if self._meter is not None:
            self._meter.close()
        self._is_open = False

    @torch.no_grad()
    def measure(self) -> list[Tensor]:
        """Return all that was measured, still on the device, for one transfer; waits for nothing."""
        self._put_together()
        self._hand_in()
        drifts = self._meter.measure() if self._meter is not None and self._is_open else torch.empty(0, 4)
        norms = list(self._norms.values())
        weights = _joined([_affine(norm, "weight") for norm in norms if isinstance(norm.weight, Tensor)])
        biases = _joined([_affine(norm, "bias") for norm in norms if isinstance(norm.bias, Tensor)])
        tracking = [] if self._training else list(self._tracking.values())
        statistics = [_joined([getattr(layer, name) for layer in tracking]) for name in ("running_mean", "running_var")]
        pooled = (
            [torch.empty(4, 0), torch.empty(2, 0)] if self._pool is None else [self._pool.channels, self._pool.layers]
        )
        return [*pooled, *self._counts.values(), drifts, weights, biases, *statistics]

    def _put_together(self) -> None:
        if self._readings:
            device = self._readings[0][1].centre.device if self._pool is None else self._pool.channels.device
            new = flatten(self._readings, device)
            self._pool = merge([new] if self._pool is None else [self._pool, new])
            self._readings, self._waiting = [], 0

    def _hand_in(self) -> None:
        """Tell the drift meter what the layers were given whose buffers don't tell."""
        if self._meter is None or self._pool is None or not self._observed:
            return
        places = {name: index for index, name in enumerate(self._tracking)}
        found = []
        for key, values in zip(self._pool.keys, self._pool.split(), strict=True):
            if key.what == "input" and key.layer in places:
                found.append((places[key.layer], values[1], values[2] / (values[0] - 1)))
        self._meter.hand_in(found)

    def _see(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensor = next(_tensors(output), None)
        if tensor is None:
            return
        if self._gradients and tensor.requires_grad:
            # Also in a recomputation: with reentrant checkpointing its graph is the one that backward goes through.
            tensor.register_hook(partial(self._see_gradient, name))
        if in_backward():
            return
        self._order.setdefault(name)
        self._take("activation", name, tensor)
        if name in self._observed and args:
            self._take("input", name, args[0])

    def _see_gradient(self, name: str, gradient: Tensor) -> None:
        if self._is_attached:
            self._take("gradient", name, gradient)

    @torch.no_grad()
    def _take(self, what: str, name: str, tensor: Tensor) -> None:
        layer = self.layers[name]
        is_norm = name in self._norms
        dim = 1 if is_norm else self._channel_dim
        width = tensor.shape[dim] if tensor.dim() > 1 else 1
        if tensor.numel() == 0:
            return
        widths = self._widths.setdefault((what, name), set())
        if width not in widths:
            if self._too_many_widths(widths, name, tensor):
                return
            widths.add(width)
        key, data = Key(what, name, width), by_channel(tensor, width, dim)
        # A normalised value is zero by chance alone; of a gradient, nobody asks.
        is_activation = what == "activation"
        bounds = bounds_of(layer) if is_activation else None
        self._readings.append((key, read(data, zeros=is_activation and not is_norm, bounds=bounds)))
        self._waiting += width
        if is_activation and name in self._histograms:
            counts = bucket_counts(data)
            self._counts[key] = self._counts[key] + counts if key in self._counts else counts
        if self._waiting > MAX_WAITING:
            self._put_together()

    def _too_many_widths(self, widths: set[int], name: str, tensor: Tensor) -> bool:
        if len(widths) == MAX_WIDTHS and name not in self._left_out:
            self._left_out.add(name)
            warnings.warn(
                f"{name} gave activations of more than {MAX_WIDTHS} sizes in dimension {self._channel_dim}, the last one of shape "
                f"{tuple(tensor.shape)}; it is left out from here on. If its channels come last, pass channel_dim=-1.",
                stacklevel=2,
            )
        return len(widths) >= MAX_WIDTHS

    def _sample(
        self, summaries: dict[Key, Summary], counts: dict[Key, Tensor], drifts: Tensor, *statistics: Tensor
    ) -> Sample:
        weights, biases, means, variances = statistics
        sample = Sample()
        affine = weights_and_biases(self._norms, weights, biases)
        keys: dict[str, list[Key]] = {}
        for key in summaries:
            if key.what == "activation":
                keys.setdefault(key.layer, []).append(key)
        for name in (*self._order, *(name for name in self._norms if name not in self._order)):
            for position, key in enumerate(keys.get(name) or [Key("activation", name, 0)]):
                label = name if position == 0 else f"{name}[{key.width}]"
                row = sample.rows[label] = dict.fromkeys(COLUMNS)
                if (found := summaries.get(key)) is not None:
                    row.update(self._activation_values(key, found))
                    sample.channels[label] = (torch.from_numpy(found.channel_mean), torch.from_numpy(found.channel_std))
                    if key in counts:
                        sample.histograms[label] = counts[key]
                if (found := summaries.get(key._replace(what="gradient"))) is not None:
                    row.update(grad_std=_number(found.std), grad_nonfinite=_number(found.nonfinite))
                row.update(affine.get(name, {}))
        for name, values in zip(self._tracking, drifts.tolist(), strict=False):
            sample.rows[name].update(zip(DRIFT_STATISTICS, map(_number, values), strict=True))
        if len(means):
            self._add_evaluation_drift(sample, summaries, means, variances)
        return sample

    def _activation_values(self, key: Key, found: Summary) -> dict[str, float | None]:
        row = {name: _number(getattr(found, name)) for name in ("mean", "std", "abs_max", "nonfinite")}
        if bounds_of(self.layers[key.layer]) is not None:
            row["saturated_fraction"] = found.saturated_fraction
        if key.layer not in self._norms:
            # Dead is dead since the epoch began, and a batch of a training step is only a part of it.
            self._dead[key] = found.dead & self._dead.get(key, np.array(True))
            row.update(zero_fraction=found.zero_fraction, dead_fraction=float(self._dead[key].mean()))
        return row

    def _add_evaluation_drift(
        self, sample: Sample, summaries: dict[Key, Summary], means: Tensor, variances: Tensor
    ) -> None:
        widths = [layer.num_features for layer in self._tracking.values()]
        for (name, layer), mean, variance in zip(
            self._tracking.items(), means.split(widths), variances.split(widths), strict=True
        ):
            found = summaries.get(Key("input", name, layer.num_features))
            if found is None:
                continue
            batch = torch.from_numpy(found.channel_mean), torch.from_numpy(found.channel_std).square()
            shift, log_ratio = drift(*batch, mean.double(), variance.double(), layer.eps)
            values = summarise_drift(shift[None], log_ratio[None], torch.tensor([len(mean)]))[0].tolist()
            sample.rows[name].update(zip(DRIFT_STATISTICS, map(_number, values), strict=True))


def _affine(norm: _BatchNorm, name: str) -> Tensor:
    """The whole parameter, also where ranks hold parts of it; NaN where it can't be told."""
    whole = full_value(getattr(norm, name), (norm.num_features,))
    return torch.full((norm.num_features,), torch.nan, device=getattr(norm, name).device) if whole is None else whole


def _joined(tensors: list[Tensor]) -> Tensor:
    """The tensors one after the other, on the device of the first."""
    return (
        torch.cat(
            [tensor if tensor.device == tensors[0].device else tensor.to(tensors[0].device) for tensor in tensors]
        )
        if tensors
        else torch.empty(0)
    )


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of any shapes and dtypes to the host, bit for bit, in a single transfer: each would wait for the
    device anew."""
    if not tensors:
        return []
    device = next((tensor.device for tensor in tensors if tensor.numel()), tensors[0].device)
    of_dtype: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        of_dtype.setdefault(tensor.dtype, []).append(index)
    blocks = [
        torch.cat([tensors[index].detach().to(device).reshape(-1) for index in indices])
        for indices in of_dtype.values()
    ]
    packed = torch.cat([block.view(torch.uint8) for block in blocks]).cpu()
    host = list(tensors)
    parts = packed.split([block.numel() * block.element_size() for block in blocks])
    for part, (dtype, indices) in zip(parts, of_dtype.items(), strict=True):
        # A copy of its own: a view into the middle of the bytes may not be aligned for its dtype.
        pieces = part.clone().view(dtype).split([tensors[index].numel() for index in indices])
        for index, piece in zip(indices, pieces, strict=True):
            host[index] = piece.view(tensors[index].shape)
    return host


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a module's output, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))


def _number(value: Any) -> float | None:
    """The value as a float; None where there was too little for it, which is NaN."""
    number = float(value)
    return None if number != number else number
