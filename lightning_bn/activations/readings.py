"""What the hooks have read for one sample, until it is put together into one pool."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bn.activations.call_sites import CallSite
from lightning_bn.activations.channel_axis import ChannelAxis
from lightning_bn.activations.effective_rank import gram
from lightning_bn.activations.metric import by_channel
from lightning_bn.activations.moments_to_pool import Key, Pool, flatten, merge
from lightning_bn.activations.sample_rows import bounds_of_row, is_function
from lightning_bn.activations.tensor_to_moments import TensorMoments, bucket_counts, read
from lightning_bn.torch_internals import is_batched, is_wrapper

# A place may be called with activations of several widths. More than these are no widths but lengths: the channels are
# in another dimension.
MAX_WIDTHS = 8

# Channels whose readings wait to be put together: a validation has many batches, a training step is below this.
MAX_WAITING = 2**20


class Readings:
    """The moments of each tensor that a hook hands in, on its device, and the reasons why one can't be read.

    Args:
        model: which holds the layers.
        layers: by name.
        histograms: names of the layers to count into buckets.
        ranked: names of those whose effective rank is measured; None: all rows.
        channel_dim: which dimension holds the channels, None: as the layers around tell.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        histograms: Collection[str],
        ranked: Collection[str] | None,
        channel_dim: int | None,
    ) -> None:
        self._layers = layers
        self._histograms = frozenset(histograms)
        self._ranked = None if ranked is None else frozenset(ranked)
        self.axis = ChannelAxis(model, channel_dim)
        # A model that is wholly on the meta device is measured there, to count what that launches.
        held = [*model.parameters(), *model.buffers()]
        self._is_abstract = bool(held) and all(tensor.is_meta for tensor in held)
        self._asks: dict[str, tuple[bool, tuple[float, float] | None]] = {}
        self._known: set[Key] = set()
        self._widths: dict[tuple[str, CallSite], set[int]] = {}
        self._too_wide: set[str] = set()
        self.left_out: dict[str, str] = {}
        """By layer, why its activations can't be read; kept from sample to sample."""
        self.clear()

    def clear(self) -> None:
        """Begin the next sample."""
        self._readings: list[tuple[Key, TensorMoments]] = []
        self._waiting = 0  # channels in them
        self.pool: Pool | None = None  # of the readings before these
        self.sums: dict[tuple[str, Key], Tensor] = {}  # "histogram": in buckets; "gram": products of channels

    def put_together(self) -> None:
        """Make one pool of all that was read since the last time."""
        if self._readings:
            device = self._readings[0][1].centre.device if self.pool is None else self.pool.channels.device
            new = flatten(self._readings, device)
            self.pool = merge([new] if self.pool is None else [self.pool, new])
            self._readings, self._waiting = [], 0

    def key(self, what: str, name: str, place: CallSite, tensor: Tensor) -> Key:
        return Key(what, place, tensor.shape[self.axis.of(name, tensor)] if tensor.dim() > 1 else 1)

    def take(self, what: str, name: str, place: CallSite, tensor: Tensor) -> bool:
        """Read a tensor, and tell whether that could be done; whatever prevents it, the fit goes on."""
        try:
            reason = self._unreadable(tensor)
            is_read = reason is None and tensor.numel() > 0 and self._read(what, name, place, tensor)
        except Warning:
            raise  # where the user's filters make errors of warnings
        except Exception as error:
            first, *_ = str(error).splitlines() or [""]
            reason, is_read = f"{type(error).__name__}: {first}", False
        if reason is not None:
            self.left_out.setdefault(name, f"its gradient: {reason}" if what == "gradient" else reason)
        if self._waiting > MAX_WAITING:
            self.put_together()
        return is_read

    def _read(self, what: str, name: str, place: CallSite, tensor: Tensor) -> bool:
        dims = tensor.dim()
        dim = self.axis.of(name, tensor)
        width = tensor.shape[dim] if dims > 1 else 1
        key = Key(what, place, width)
        if key not in self._known:
            if self._too_many_widths(self._widths.setdefault((what, place), set()), name, tensor):
                return False
            self._widths[what, place].add(width)
            self._known.add(key)
        data = tensor.detach() if dim == 1 and dims > 1 else by_channel(tensor.detach(), width, dim)
        # A normalised value is zero by chance alone; of a gradient, nobody asks.
        is_activation = what == "activation"
        zeros, bounds = self._asked(name) if is_activation else (False, None)
        self._readings.append((key, read(data, zeros=zeros, bounds=bounds)))
        self._waiting += width
        if is_activation and name in self._histograms:
            self._add("histogram", key, bucket_counts(data))
        if is_activation and (self._ranked is None or name in self._ranked):
            self._add("gram", key, gram(data))
        return True

    def _asked(self, name: str) -> tuple[bool, tuple[float, float] | None]:
        """Whether zeros of a row say something, and its bounds."""
        if name not in self._asks:
            self._asks[name] = is_function(name, self._layers), bounds_of_row(name, self._layers)
        return self._asks[name]

    def _add(self, kind: str, key: Key, values: Tensor) -> None:
        known = self.sums.get((kind, key))
        self.sums[kind, key] = values if known is None else known + values

    def _unreadable(self, tensor: Tensor) -> str | None:
        """Why no kernel can read a tensor; None: it can."""
        if tensor.is_nested:
            return "nested"
        if is_batched(tensor):
            return "batched by torch.vmap or is_grads_batched=True"
        if is_wrapper(tensor):
            return type(tensor).__name__
        if tensor.layout is not torch.strided:
            return str(tensor.layout).removeprefix("torch.")
        if tensor.is_meta and not self._is_abstract:
            return "on the meta device"
        if tensor.itemsize < 2:
            return str(tensor.dtype).removeprefix("torch.")
        return None

    def _too_many_widths(self, widths: set[int], name: str, tensor: Tensor) -> bool:
        if len(widths) == MAX_WIDTHS and name not in self._too_wide:
            self._too_wide.add(name)
            warnings.warn(
                f"{name} gave activations of more than {MAX_WIDTHS} sizes in dimension "
                f"{self.axis.of(name, tensor)}, the last one of shape "
                f"{tuple(tensor.shape)}; it is left out from here on. If its channels come last, pass channel_dim=-1.",
                stacklevel=2,
            )
        return len(widths) >= MAX_WIDTHS


def first_float(output: Any) -> Tensor | None:
    """Return the first of `float_tensors`, None where there is none."""
    first = output[0] if isinstance(output, tuple) and output else output
    if isinstance(first, Tensor) and first.is_floating_point():  # as a rule, and a generator takes longer
        return first
    return next(float_tensors(output), None)


def float_tensors(output: Any, *, with_bytes: bool = False) -> Iterator[Tensor]:
    """The floating-point tensors in a module's arguments or output, in order; with bytes, as images have them, too."""
    if isinstance(output, Tensor):
        if output.is_floating_point() or (with_bytes and output.dtype == torch.uint8):
            yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from float_tensors(part, with_bytes=with_bytes)
    elif isinstance(output, Mapping):
        yield from float_tensors(tuple(output.values()), with_bytes=with_bytes)
