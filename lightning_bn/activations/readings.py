"""What the hooks have read for one sample, until it is put together into one pool."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

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

# Bytes of an activation that waits, as a copy, for others of its shape, and of all that wait: kernels take as long for
# one small tensor as for many.
SMALL, MAX_BYTES = 2**17, 2**20

# Channels whose readings wait to be put together: a validation has many batches, a training step is below this.
MAX_CHANNELS = 2**20

# Of how many kinds of tensors, by place and shape, it is remembered how to read them.
MAX_PLANS = 2**13

_Form: TypeAlias = tuple[tuple[int, ...], torch.dtype, torch.device, bool, tuple[float, float] | None]


class _Plan(NamedTuple):
    """How to read a tensor of one kind at one place."""

    key: Key
    dim: int  # of the channels
    form: _Form  # what is read together: shape by channel, dtype, device; whether zeros count, and the bounds
    is_small: bool
    sums: tuple[tuple[str, Callable[[Tensor], Tensor]], ...]  # what else is wanted


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
        self._plans: dict[tuple[Any, ...], _Plan] = {}
        self._widths: dict[tuple[str, CallSite], set[int]] = {}
        self._too_wide: set[str] = set()
        self.left_out: dict[str, str] = {}
        """By layer, why its activations can't be read; kept from sample to sample."""
        self.clear()

    def clear(self) -> None:
        """Begin the next sample."""
        self._waiting: dict[_Form, tuple[list[Key], list[Tensor]]] = {}
        self._bytes = 0  # in them
        self._readings: list[tuple[tuple[Key, ...], TensorMoments]] = []
        self._channels = 0  # in them
        self._has_failed = False  # whether some of what waited could not be read
        self.pool: Pool | None = None  # of the readings before these
        self.order: dict[Key, str] = {}  # of activations, in the order of the calls, and the module's name
        self.sums: dict[tuple[str, Key], Tensor] = {}  # "histogram": in buckets; "gram": products of channels

    def put_together(self) -> None:
        """Make one pool of all that was read since the last time."""
        for form in list(self._waiting):
            self._read_waiting(form)
        if self._readings:
            device = self._readings[0][1].centre.device if self.pool is None else self.pool.channels.device
            new = flatten(self._readings, device)
            self.pool = merge([new] if self.pool is None else [self.pool, new])
            self._readings, self._channels = [], 0
        if self._has_failed:
            known = set() if self.pool is None else {*self.pool.keys}
            self.order = {key: name for key, name in self.order.items() if key in known}
            self.sums = {each: values for each, values in self.sums.items() if each[1] in known}

    def take(self, what: str, name: str, place: CallSite, tensor: Tensor) -> Key | None:
        """Read a tensor, now or with others, and return whose it is; None if that can't be done: whatever prevents it,
        the fit goes on."""
        try:
            if tensor.is_nested or is_batched(tensor):
                self._leave_out(what, name, self._unreadable(tensor) or "")
                return None
            kind = (what, place, type(tensor), tensor.shape, tensor.dtype, tensor.layout, tensor.device)
            plan = self._plans.get(kind)
            if plan is None:
                if (plan := self._plan(what, name, place, tensor)) is None:
                    return None
                if len(self._plans) == MAX_PLANS:
                    self._plans.clear()
                self._plans[kind] = plan
            data = tensor.detach()
            if plan.dim != 1 or data.dim() < 2:
                data = by_channel(data, plan.key.width, plan.dim)
            sums = [(kind_of_sum, sum_of(data)) for kind_of_sum, sum_of in plan.sums]  # first, as this may fail
            if plan.is_small:
                keys, tensors = self._waiting.setdefault(plan.form, ([], []))
                keys.append(plan.key)
                tensors.append(data.clone())  # since whatever comes next may write it in place
                self._bytes += data.nbytes
            else:
                self._read((plan.key,), [data], plan.form)
            for kind_of_sum, values in sums:
                self._add(kind_of_sum, plan.key, values)
        except Warning:
            raise  # where the user's filters make errors of warnings
        except Exception as error:
            self._leave_out(what, name, error)
            return None
        if self._bytes > MAX_BYTES:
            self._read_waiting(max(self._waiting, key=self._bytes_of))
        if self._channels > MAX_CHANNELS:
            self.put_together()
        if what in ("activation", "given"):
            self.order.setdefault(plan.key, name)
        return plan.key

    def _leave_out(self, what: str, name: str, reason: Exception | str) -> None:
        first, *_ = str(reason).splitlines() or [""]
        told = f"{type(reason).__name__}: {first}" if isinstance(reason, Exception) else first
        self.left_out.setdefault(name, f"its gradient: {told}" if what == "gradient" else told)

    def _plan(self, what: str, name: str, place: CallSite, tensor: Tensor) -> _Plan | None:
        if (reason := self._unreadable(tensor)) is not None:
            self._leave_out(what, name, reason)
        if reason is not None or not tensor.numel():
            return None
        dim = self.axis.of(name, tensor)
        width = tensor.shape[dim] if tensor.dim() > 1 else 1
        widths = self._widths.setdefault((what, place), set())
        if width not in widths and self._too_many_widths(widths, name, tensor):
            return None
        widths.add(width)
        is_activation = what == "activation"
        sums: list[tuple[str, Callable[[Tensor], Tensor]]] = []
        if is_activation and name in self._histograms:
            sums.append(("histogram", bucket_counts))
        if is_activation and (self._ranked is None or name in self._ranked):
            sums.append(("gram", gram))
        # A normalised value is zero by chance alone; of a gradient, nobody asks.
        asks = (is_function(name, self._layers), bounds_of_row(name, self._layers)) if is_activation else (False, None)
        shape = tuple(by_channel(tensor, width, dim).shape)
        is_small = tensor.nbytes <= SMALL and type(tensor) in (Tensor, nn.Parameter)
        return _Plan(Key(what, place, width), dim, (shape, tensor.dtype, tensor.device, *asks), is_small, tuple(sums))

    def _bytes_of(self, form: _Form) -> int:
        _, tensors = self._waiting[form]
        return len(tensors) * tensors[0].nbytes

    def _read_waiting(self, form: _Form) -> None:
        self._bytes -= self._bytes_of(form)
        keys, tensors = self._waiting.pop(form)
        try:
            self._read(tuple(keys), tensors, form)
        except Warning:
            raise
        except Exception as error:
            self._has_failed = True
            for key in keys:
                self._leave_out(key.what, self.order.get(key, key.place.path), error)

    def _read(self, keys: tuple[Key, ...], tensors: list[Tensor], form: _Form) -> None:
        *_, zeros, bounds = form
        found = read(tensors, zeros=zeros, bounds=bounds)
        self._readings += [(keys, found[0])] if len(found) == 1 else zip([(key,) for key in keys], found, strict=True)
        self._channels += len(keys) * keys[0].width

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
