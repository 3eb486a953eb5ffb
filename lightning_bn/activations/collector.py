"""Statistics of many layers at once: hooks only while they are wanted, and one transfer to the host for all layers together."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.activations.drift import DRIFT_STATISTICS, DriftMeter, summarise_drift
from lightning_bn.activations.layers import bounds_of
from lightning_bn.activations.stats import ActivationStats, dead_channels, merge_states, summarise
from lightning_bn.discovery import BatchNormLayer
from lightning_bn.modes import eager
from lightning_bn.moments import drift
from lightning_bn.ranks.collective import share
from lightning_bn.torch_internals import in_backward

__all__ = ["COLUMNS", "LayerCollector", "Sample", "to_host"]

COLUMNS = (
    "mean",
    "std",
    "abs_max",
    "zero_fraction",
    "dead_fraction",
    "saturated_fraction",
    "nonfinite",
    *DRIFT_STATISTICS,
    "weight_min",
    "weight_max",
    "bias_min",
    "bias_max",
    "weight_near_zero",
    "grad_std",
    "grad_nonfinite",
)

# A batch norm's weight starts at 1; below a hundredth of that the channel hardly reaches the next layer.
NEAR_ZERO = 0.01

# A layer may be called with activations of several widths, as torchvision's Bottleneck does with its ReLU. More than these are no widths
# but lengths: the channels are in another dimension.
MAX_WIDTHS = 8

_Key = tuple[str, str, int]  # what ("activation", "gradient" or "input"), layer, channels
_State = dict[str, Tensor]


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

    Between `attach` and `detach` a forward hook on each layer takes its output in; both can be called any number of times before `collect`,
    which gives one sample of all that was seen and starts the next. A layer that is called several times is pooled over all its calls;
    where these differ in the number of channels, each number has a row: ``relu``, ``relu[256]``. Of an output that is a tuple, list or dict
    the first floating-point tensor counts. A forward that activation checkpointing repeats is not a second sample. Compiled modules run
    eagerly while hooks are attached, since compiled code has none.

    Args:
        model: which holds the layers.
        layers: by name, as from `layers.select_layers`.
        training: whether drift is that of training batches, from the buffers, or that of the inputs that an evaluation sees.
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
        self._stats: dict[_Key, ActivationStats] = {}
        self._order: dict[str, None] = {}  # names in the order of their first call
        self._dead: dict[_Key, Tensor] = {}
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
        # As objects, since a layer may have run on one rank alone.
        ranks = share((*self._to_host(), list(self._order)))
        # Each rank's layers see their own batches; the buffers of the first are the ones that are broadcast and saved.
        _, drifts, parameters, _ = ranks[0]
        states = reduce(_merge, (states for states, *_ in ranks))
        self._order = dict.fromkeys(name for *_, order in ranks for name in order)
        sample = Sample()
        for name in (*self._order, *(name for name in self._norms if name not in self._order)):
            self._add_rows(sample, name, states, parameters.get(name, {}))
        for name, values in drifts.items():
            sample.rows[name].update(zip(DRIFT_STATISTICS, map(_number, values), strict=True))
        for stats in self._stats.values():
            stats.reset()
        self._is_open = False
        return sample

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
        dim = 1 if isinstance(layer, _BatchNorm) else self._channel_dim
        width = tensor.shape[dim] if tensor.dim() > 1 else 1
        key = (what, name, width)
        if key not in self._stats:
            if width == 0 or self._too_many_widths(what, name, tensor):
                return
            with torch.device(tensor.device):
                self._stats[key] = ActivationStats(
                    width,
                    channel_dim=dim,
                    bounds=bounds_of(layer) if what == "activation" else None,
                    histogram=what == "activation" and name in self._histograms,
                )
        self._stats[key].update(tensor)

    def _too_many_widths(self, what: str, name: str, tensor: Tensor) -> bool:
        widths = [key for key in self._stats if key[:2] == (what, name)]
        if len(widths) == MAX_WIDTHS and name not in self._left_out:
            self._left_out.add(name)
            warnings.warn(
                f"{name} gave activations of more than {MAX_WIDTHS} sizes in dimension {self._channel_dim}, the last one of shape "
                f"{tuple(tensor.shape)}; it is left out from here on. If its channels come last, pass channel_dim=-1.",
                stacklevel=2,
            )
        return len(widths) >= MAX_WIDTHS

    def _to_host(self) -> tuple[dict[_Key, _State], dict[str, list[float]], dict[str, _State]]:
        """All that was measured on the device, in one transfer: states by key, drift by layer, parameters by layer."""
        measured = {(key, name): tensor for key, stats in self._stats.items() for name, tensor in stats.metric_state.items()}
        parameters = {
            (layer, name): tensor
            for layer, norm in self._norms.items()
            for name in (("weight", "bias") if self._training else ("weight", "bias", "running_mean", "running_var"))
            if isinstance(tensor := getattr(norm, name), Tensor)
        }
        drifts = self._meter.measure(self._observed_moments()) if self._meter is not None and self._is_open else torch.empty(0, 1)
        tensors: list[Any] = [*measured.values(), *parameters.values(), drifts]
        host = to_host(tensors)
        states: dict[_Key, _State] = {key: {} for key, _ in measured}
        for (key, name), tensor in zip(measured, host, strict=False):
            states[key][name] = tensor
        own: dict[str, _State] = {layer: {} for layer, _ in parameters}
        for (layer, name), tensor in zip(parameters, host[len(measured) :], strict=False):
            own[layer][name] = tensor
        return states, dict(zip(self._tracking, host[-1].tolist(), strict=False)), own

    def _observed_moments(self) -> dict[int, tuple[Tensor, Tensor]]:
        found = {}
        for index, (name, layer) in enumerate(self._tracking.items()):
            stats = self._stats.get(("input", name, layer.num_features))
            if stats is not None:
                values = summarise(stats.metric_state)
                found[index] = (values["channel_mean"], values["channel_std"].square())
        return found

    def _add_rows(self, sample: Sample, name: str, states: dict[_Key, _State], parameters: dict[str, Tensor]) -> None:
        widths = [key[2] for key in states if key[:2] == ("activation", name)]
        for position, width in enumerate(widths or [0]):
            label = name if position == 0 else f"{name}[{width}]"
            row = sample.rows[label] = dict.fromkeys(COLUMNS)
            if (state := states.get(("activation", name, width))) is not None:
                values = summarise(state)
                row.update(self._activation_values(("activation", name, width), state, values))
                sample.channels[label] = (values["channel_mean"], values["channel_std"])
                if "histogram" in values:
                    sample.histograms[label] = values["histogram"]
            if (state := states.get(("gradient", name, width))) is not None:
                values = summarise(state)
                row.update(grad_std=_number(values["std"]), grad_nonfinite=_number(values["nonfinite"]))
            if name in self._norms:
                row.update(_affine_values(parameters))
                if not self._training and (state := states.get(("input", name, width))) is not None:
                    row.update(self._evaluation_drift(name, state, parameters))

    def _activation_values(self, key: _Key, state: _State, values: dict[str, Tensor]) -> dict[str, float | None]:
        row = {name: _number(values[name]) for name in COLUMNS if name in values}
        # Dead is dead since the epoch began, and a batch of a training step is only a part of it.
        if state["seen"] > 0:
            self._dead[key] = dead_channels(state) & self._dead.get(key, torch.tensor(True))
        if key in self._dead:
            row["dead_fraction"] = self._dead[key].double().mean().item()
        if key[1] in self._norms:
            # A normalised value is zero by chance alone, so that neither says anything of the layer.
            row.update(zero_fraction=None, dead_fraction=None)
        return row

    def _evaluation_drift(self, name: str, state: _State, parameters: dict[str, Tensor]) -> dict[str, float | None]:
        values = summarise(state)
        mean, var = values["channel_mean"], values["channel_std"].square()
        changes = drift(mean, var, parameters["running_mean"].double(), parameters["running_var"].double(), self._norms[name].eps)
        summary = summarise_drift(changes[0][None], changes[1][None], torch.tensor([len(mean)]))
        return dict(zip(DRIFT_STATISTICS, map(_number, summary[0]), strict=True))


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of any shapes and dtypes to the host, bit for bit, in a single transfer: each would wait for the device anew."""
    if not tensors:
        return []
    device = tensors[0].device
    of_dtype: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        of_dtype.setdefault(tensor.dtype, []).append(index)
    blocks = [torch.cat([tensors[index].detach().to(device).reshape(-1) for index in indices]) for indices in of_dtype.values()]
    packed = torch.cat([block.view(torch.uint8) for block in blocks]).cpu()
    host = list(tensors)
    parts = packed.split([block.numel() * block.element_size() for block in blocks])
    for part, (dtype, indices) in zip(parts, of_dtype.items(), strict=True):
        # A copy of its own: a view into the middle of the bytes may not be aligned for its dtype.
        pieces = part.clone().view(dtype).split([tensors[index].numel() for index in indices])
        for index, piece in zip(indices, pieces, strict=True):
            host[index] = piece.view(tensors[index].shape)
    return host


def _merge(one: dict[_Key, _State], other: dict[_Key, _State]) -> dict[_Key, _State]:
    merged = dict(one)
    for key, state in other.items():
        merged[key] = merge_states(merged[key], state) if key in merged else state
    return merged


def _affine_values(parameters: dict[str, Tensor]) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for name in ("weight", "bias"):
        if name in parameters:
            numbers = parameters[name].float().numpy()  # a third of the time of torch for so few numbers
            values |= {f"{name}_min": _number(numbers.min()), f"{name}_max": _number(numbers.max())}
            if name == "weight":
                values["weight_near_zero"] = float((abs(numbers) < NEAR_ZERO).mean())
    return values


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
