"""Averaging for batch-norm subclasses of other packages and for patched layers, which keep their class and run their
own forward."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_bn.averaging import Averaging, Batch
from lightning_bn.averaging.base import apply_to_statistics
from lightning_bn.buffers import next_step, running_mean, running_statistics
from lightning_bn.layers.settlement import (
    ATTACHED,
    LISTENERS,
    OBSERVED,
    ScratchRows,
    advance,
    batch_moments,
    count_like,
    is_deferred,
    is_finite,
    is_stopped,
    is_synchronised,
    kernel_momentum,
    notify,
    rule_of,
    scratch_of,
    synchronised_moments,
    write,
)
from lightning_bn.outermost import is_set, warn_of_cleared_hooks
from lightning_bn.torch_internals import in_backward, is_tracing

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_STAND_INS = "_lightning_bn_stand_ins"


def input_and_mask(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return what a call of `layer` normalises, and the mask, if a layer of this package is given one.

    The second argument of another package's forward may mean something else.
    """
    # torch.compile of 2.6 and 2.7 knows no zip(strict=...).
    given = dict(zip(("input", "mask"), args)) | kwargs  # noqa: B905
    mask = given.get("mask")
    if not (getattr(type(layer), "takes_mask", False) and isinstance(mask, Tensor) and mask.dtype == torch.bool):
        mask = None
    return given["input"] if "input" in given else next(iter(given.values())), mask


class StandIns:
    """What a layer has in the place of its own buffers, momentum and 16-bit parameters during one call, and what it
    had."""

    def __init__(self, layer: _BatchNorm, scratch: ScratchRows | None, zeroed: bool) -> None:
        self.thread = threading.get_ident()
        self.scratch = scratch
        self.zeroed = zeroed
        self.buffers: dict[str, Tensor | None] = {name: layer._buffers[name] for name in _BUFFERS}
        self.affine: list[tuple[dict[str, Any], str, Tensor]] = []
        self.momentum = layer.momentum

    def make(self, layer: _BatchNorm) -> None:
        (mean, var), tracked = running_statistics(layer), layer.num_batches_tracked
        if self.scratch is not None:
            mean, var = self.scratch.mean, self.scratch.var
        elif self.zeroed:
            dtype = torch.promote_types(mean.dtype, torch.float32)
            mean, var = torch.zeros(2, len(mean), dtype=dtype, device=mean.device).unbind()
        else:
            mean, var = mean.clone(), var.clone()
        layer._buffers |= {
            "running_mean": mean,
            "running_var": var,
            "num_batches_tracked": None if tracked is None else tracked.clone(),
        }
        if self.zeroed:
            layer.momentum = 1.0
        # The kernel takes no parameters of another dtype than that of the statistics. A pruned weight is an attribute.
        places: tuple[dict[str, Any], ...] = (layer._parameters, layer.__dict__)
        for held, name in ((held, name) for held in places for name in ("weight", "bias")):
            value = held.get(name)
            if value is not None and value.dtype != mean.dtype:
                self.affine.append((held, name, value))
                with torch.enable_grad():
                    held[name] = value.to(mean.dtype)

    def undo(self, layer: _BatchNorm) -> tuple[Tensor, Tensor]:
        """Give the layer its own back; return what its forward has left in the exchanged buffers."""
        left = layer._buffers["running_mean"], layer._buffers["running_var"]
        layer._buffers |= self.buffers
        for held, name, value in self.affine:
            held[name] = value
        layer.momentum = self.momentum
        return left  # type: ignore[return-value]


class _HooksAround:
    """Two hooks around a layer's own forward: it runs with other tensors for buffers, and then its own get the average.

    A forward that follows torch's pattern calls ``F.batch_norm`` with the module's own buffers and ``momentum``. With
    zeroed buffers and momentum 1 it leaves the batch's mean and unbiased variance in them, whatever else it does. They
    are exchanged, not overwritten, since autograd keeps those of the forward. One thread at a time runs the layer.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        self._lock = threading.RLock()
        self._handles: list[RemovableHandle] = []
        self._set(layer)

    def _set(self, layer: _BatchNorm) -> None:
        self.end()
        self._handles = [
            layer.register_forward_pre_hook(self._enter, prepend=True),
            # Called on an exception too: a forward that failed must not leave the scratch tensors behind.
            layer.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

    def set_again(self, layer: _BatchNorm) -> None:
        """Set the hooks again, with a warning, where somebody has cleared them."""
        if not all(map(is_set, self._handles)):
            warn_of_cleared_hooks(layer)
            self._set(layer)

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _enter(self, layer: _BatchNorm, args: tuple[Any, ...]) -> None:
        if not layer.track_running_stats or (not layer.training and is_tracing()):
            return
        self.set_again(layer)
        self._lock.acquire()
        interrupted: StandIns | None = layer.__dict__.pop(_STAND_INS, None)
        if interrupted is not None:  # by a BaseException, of which no hook is told
            interrupted.undo(layer)
            self._lock.release()
        compiling = torch.compiler.is_compiling()
        scratch = scratch_of(layer) if layer.training and not compiling and not is_stopped(layer) else None
        if scratch is not None and is_synchronised(layer):
            scratch.copy_rows()
        elsewhere = scratch is None and not compiling and is_deferred(layer) and not in_backward()
        momentum = kernel_momentum(layer) if scratch is None else scratch.momentum
        stand_ins = StandIns(layer, scratch, zeroed=layer.training and (momentum is None or elsewhere))
        layer.__dict__[_STAND_INS] = stand_ins
        stand_ins.make(layer)

    @torch.no_grad()
    def _leave(self, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor | None) -> None:
        stand_ins: StandIns | None = layer.__dict__.pop(_STAND_INS, None)
        if stand_ins is None:
            if layer.training and layer.track_running_stats:
                self.set_again(layer)
            return
        try:
            mean, var = stand_ins.undo(layer)
            if output is not None and layer.training and not in_backward() and not is_stopped(layer):
                input, _ = input_and_mask(layer, args, kwargs)
                _take(layer, stand_ins, mean, var, input, output)
        finally:
            self._lock.release()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())


def _take(layer: _BatchNorm, stand_ins: StandIns, mean: Tensor, var: Tensor, input: Tensor, output: Tensor) -> None:
    """Report or settle what the layer's forward has left in the buffers it was given."""
    synchronised = synchronised_moments(layer)
    count: int | Tensor = input.numel() // len(mean) if synchronised is None else synchronised.count
    listened = (
        LISTENERS in layer.__dict__
        and not stand_ins.zeroed
        and (stand_ins.scratch is None or stand_ins.scratch.momentum is not None)
    )
    batch = batch_moments(layer, input, output) if listened else None
    scratch = stand_ins.scratch
    if scratch is not None:
        if mean is not scratch.mean:  # the forward has put other tensors in their place
            scratch.mean, scratch.var, scratch.own_rows = mean, var, True
        scratch.batch = batch
        if scratch.momentum is not None or isinstance(count, Tensor) or count > 0:
            scratch.report(count)
        return
    if not stand_ins.zeroed:
        if batch is not None:
            notify(layer, _batch(layer, *batch, count, None), running_statistics(layer))
        write(layer, mean, var, is_finite(var))
    elif isinstance(count, Tensor) or count > 0:
        advance(layer, rule_of(layer), _batch(layer, mean, var, count, is_finite(var)))


def _batch(layer: _BatchNorm, mean: Tensor, var: Tensor, count: int | Tensor, valid: Tensor | None) -> Batch:
    dtype = torch.promote_types(mean.dtype, torch.float32)
    mean, var = mean.to(dtype), var.to(dtype)
    return Batch(mean, var, count_like(count, mean), next_step(layer), valid)


class _WideStatistics:
    """The ``_apply`` of a layer whose running statistics stay float32 when the model is cast to 16 bits: an average
    kept in bfloat16 stalls."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _BatchNorm:
        layer = self.layer
        wide = {name: layer._buffers[name] for name in ("running_mean", "running_var")}
        type(layer)._apply(layer, fn, recurse)
        layer._buffers |= {name: apply_to_statistics(fn, buffer) for name, buffer in wide.items() if buffer is not None}
        return layer


class _ModeChange:
    """The ``train`` of a layer with an averaging: who clears all hooks of a model leaves nothing of this package that
    would run in its next forward, so the layer looks for its own wherever its mode changes, before any evaluation."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer

    def __call__(self, mode: bool = True) -> _BatchNorm:
        self.layer.__dict__[ATTACHED].set_again(self.layer)
        return type(self.layer).train(self.layer, mode)


def observe(layer: _BatchNorm) -> Callable[[], None]:
    """Let the layer of plain torch defer its updates, adding only two hooks. Returns a function that removes
    them."""
    layer.__dict__[OBSERVED] = hooks = _HooksAround(layer)

    def end() -> None:
        hooks.end()
        del layer.__dict__[OBSERVED]

    return end


def has_attached_averaging(layer: _BatchNorm) -> bool:
    """Whether `attach_averaging` gave the layer an averaging."""
    return ATTACHED in layer.__dict__


def attach_averaging(layer: _BatchNorm, averaging: Averaging) -> None:
    """Have `averaging` keep the running statistics of `layer`, to which none is attached, from now on."""
    for name in ("running_mean", "running_var"):
        buffer = getattr(layer, name)
        layer._buffers[name] = buffer.to(torch.promote_types(buffer.dtype, torch.float32))
    layer.averaging = averaging.for_layer(running_mean(layer))
    if averaging.by_momentum:
        layer.momentum = averaging.kernel_momentum
    layer.__dict__["_apply"] = _WideStatistics(layer)
    layer.__dict__.setdefault("train", _ModeChange(layer))
    layer.__dict__[ATTACHED] = _HooksAround(layer)


def detach_averaging(layer: _BatchNorm) -> None:
    """Undo `attach_averaging`; a layer without one stays as it is."""
    hooks = layer.__dict__.pop(ATTACHED, None)
    if hooks is not None:
        hooks.end()
        del layer.averaging
        layer.__dict__.pop("_apply", None)
        if isinstance(layer.__dict__.get("train"), _ModeChange):
            del layer.train
        if layer.weight is not None:
            # torch's kernel takes 16-bit parameters next to no other statistics than 16-bit ones.
            layer._buffers |= {
                name: buffer.to(layer.weight.dtype)
                for name, buffer in zip(_BUFFERS, running_statistics(layer), strict=False)
            }
