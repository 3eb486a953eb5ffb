"""How the batch of a forward gets into the running statistics: for all layers of a model at once, or for one layer by
itself.

When the outermost forward of a model begins, its deferred updates (`lightning_bn.layers.deferred`) give each layer a
pair of scratch rows, and the layer's forward lets the kernel write into them. When it ends, all are settled together,
as if the layers were one wide layer. A layer without scratch rows, because it is called by itself or inside compiled
code, settles at once: slower, and with the same result."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging import Averaging, Batch, Cumulative, Exponential
from lightning_bn.buffers import running_mean, running_statistics, running_var
from lightning_bn.moments import Moments
from lightning_bn.torch_internals import in_backward, in_transform, is_replica, kernel_moments, saved_statistics

# Names of attributes that a layer, of whatever class, has for a while.
SYNCHRONISED = "_moments_of_all_ranks"  # while it normalises with the batch of all ranks: the `Moments` of the last one
SCRATCH = "_scratch_rows"  # from the first forward of its model on
ATTACHED = "_lightning_bn_service"  # of a subclass of another package, while it has an averaging
MERGED = "_merged_over_ranks"  # while its statistics are merged over ranks, to which other updates yield
OBSERVED = "_lightning_bn_observed"  # of a layer of plain torch, while its updates are deferred
IDLE = "_idle_updates"  # the deferred updates of parts of the model that have only run inside of its forward
LISTENERS = "_listeners"  # while somebody wants to know the moments of its batches

_at_once = threading.Lock()  # two threads may run one layer


class Listener(Protocol):
    """Told of the batches that layers have settled."""

    def __call__(self, settled: Settled) -> None: ...


@dataclass(frozen=True)
class Settled:
    """What has just been settled, for one layer or for several as one wide layer of all their channels, before any
    buffer is written."""

    layers: Sequence[_BatchNorm]
    mean: Tensor  # (C,), of the batch
    var: Tensor  # (C,), unbiased, within the batch
    count: Tensor  # (L,), floating: values per channel, 0 for a layer that did not run or whose batch was skipped
    ran: Sequence[bool]  # which layers ran
    before: tuple[Tensor, Tensor]  # running mean and variance, (C,) each, that were there before the batch


class ScratchRows:
    """The rows that one layer writes in each forward of its model, and what it reports of its run.

    The rows are zeros with momentum 1, in which the kernel leaves the batch's mean and *unbiased* variance, or copies
    of the running statistics with the layer's own momentum, of which the kernel makes the new running statistics.

    They stay with the layer from forward to forward. What may be done with them is told by numbers alone: no round of
    forwards has the number 0, in which `updates` are while no forward is under way."""

    __slots__ = (
        *("batch", "count", "layer_momentum", "mean", "momentum", "own_rows", "round", "rows", "shape"),
        *("updates", "valid", "var"),
    )

    count: int | Tensor  # values per channel
    valid: Tensor | None  # (), bool: whether the batch counts for other reasons than being finite
    batch: tuple[Tensor, Tensor] | None  # mean and unbiased variance of the batch, where the rows are not these
    own_rows: bool  # whether mean and var are other tensors than the parts of the wide rows
    shape: torch.Size | None  # of the last input; None if there was anything special about it

    def __init__(self, updates: Any, mean: Tensor, var: Tensor) -> None:
        self.updates = updates
        self.rows = mean, var
        self.round = 0  # in which they were written last
        self.momentum: float | None = None  # None: rows of zeros
        self.layer_momentum: float | None = None  # what the layer's attribute was
        self.reset()

    def reset(self) -> None:
        """Forget what was reported, for another forward."""
        self.mean, self.var = self.rows
        self.own_rows = False
        self.count, self.valid, self.batch, self.shape = 0, None, None, None

    def copy_rows(self) -> None:
        """Exchange the rows for copies, which may be written without changing what autograd has saved of the other
        layers' rows."""
        self.mean, self.var, self.own_rows = self.mean.clone(), self.var.clone(), True

    def report(self, count: int | Tensor) -> None:
        """Report that the kernel has written the rows, of a batch of `count` values per channel."""
        self.round, self.count = self.updates.round, count

    def report_moments(self, batch: Batch, running: tuple[Tensor, Tensor]) -> None:
        """Report a batch whose moments are known and that the kernel has not seen."""
        mean, var = batch.mean, batch.var
        if self.momentum is not None:
            self.batch = mean, var
            mean, var = (
                old.to(new.dtype).lerp(new, self.momentum) for old, new in zip(running, (mean, var), strict=True)
            )
        self.mean, self.var, self.own_rows = mean.to(self.mean.dtype), var.to(self.var.dtype), True
        self.report(batch.count)
        self.valid = batch.valid

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a layer has no rows until a forward of its own model begins."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def is_synchronised(layer: _BatchNorm) -> bool:
    """Whether the layer normalises with the batch of all ranks."""
    return SYNCHRONISED in layer.__dict__


def is_stopped(layer: _BatchNorm) -> bool:
    """Whether ``momentum = 0`` stops an averaging that has no momentum, as it stops torch's average."""
    averaging: Any = layer._modules.get("averaging")
    return averaging is not None and not averaging.by_momentum and layer.momentum == 0


def is_deferred(layer: _BatchNorm) -> bool:
    """Whether a forward of the layer's model is under way, at whose end the layer's batch is settled."""
    scratch: ScratchRows | None = layer.__dict__.get(SCRATCH)
    return scratch is not None and scratch.updates.round != 0


def scratch_of(layer: _BatchNorm) -> ScratchRows | None:
    """Return the scratch that this call of the layer may use, or None where it must settle by itself."""
    scratch: ScratchRows | None = layer.__dict__.get(SCRATCH)
    if in_transform():
        return None
    if scratch is not None and scratch.updates.round and not scratch.updates.is_running():  # interrupted
        scratch.updates.abort()
    if scratch is None or not scratch.updates.round:
        if IDLE in layer.__dict__ and not in_backward():
            for updates in list(layer.__dict__[IDLE]):
                updates.resume()
        return None
    if scratch.updates.thread != threading.get_ident() or in_backward():
        return None
    if scratch.round == scratch.updates.round:
        scratch = scratch.updates.next_round(layer)
    scratch.reset()
    return scratch


def torch_rule(momentum: float | None) -> Averaging:
    """The averaging that torch means by `momentum`."""
    return Cumulative() if momentum is None else Exponential(momentum)


_torch_rule = cache(torch_rule)  # a module made anew for each layer and step would be what settling costs


def rule_of(layer: _BatchNorm) -> Averaging:
    """The averaging that moves the layer's statistics; for one of torch's, the same rule in this package's words."""
    averaging = layer._modules.get("averaging")
    if not isinstance(averaging, Averaging) or (ATTACHED in layer.__dict__ and averaging.by_momentum):
        # torch.compile can't look into a cache of Python's.
        return torch_rule(layer.momentum) if torch.compiler.is_compiling() else _torch_rule(layer.momentum)
    return averaging


def rule_unless_kernel(layer: _BatchNorm) -> Averaging | None:
    """`rule_of` the layer, or None where torch's kernel computes the average in place."""
    averaging: Any = layer._modules.get("averaging")
    if averaging is None or (ATTACHED in layer.__dict__ and averaging.by_momentum):
        return None if layer.__dict__["momentum"] is not None else rule_of(layer)
    return None if averaging.kernel_momentum is not None else rule_of(layer)


def kernel_momentum(layer: _BatchNorm) -> float | None:
    """The momentum with which torch's kernel computes the layer's average in place; None where it can't."""
    averaging: Any = layer._modules.get("averaging")
    if averaging is None or (ATTACHED in layer.__dict__ and averaging.by_momentum):
        # Third parties set a layer's momentum, and a subclass of another package has no property that would pass it on.
        # A compiled layer is asked by name: torch.compile before 2.12 takes an entry of __dict__ for the property.
        momentum: float | None = layer.momentum if torch.compiler.is_compiling() else layer.__dict__["momentum"]
    else:
        momentum = averaging.kernel_momentum
    return momentum


def is_finite(var: Tensor) -> Tensor:
    """Whether the moments of a batch are finite, as a tensor, so that nothing waits for the device: () bool.

    The variance tells for both: it is a sum of squared differences from the mean, NaN or infinite as soon as that is.
    """
    return (var < math.inf).all()


def batch_moments(layer: _BatchNorm, input: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and *unbiased* variance of the batch that `layer` has just normalised, (C,) each; the kernel has kept
    them where there is a graph."""
    synchronised = synchronised_moments(layer)
    if synchronised is not None:
        return synchronised.mean, synchronised.variance(unbiased=True)
    count = input.numel() // len(running_mean(layer))
    if count == 0:
        return torch.zeros_like(running_mean(layer)), torch.zeros_like(running_var(layer))
    with torch.no_grad():
        kept = kept_statistics(layer, output) if count > 1 else None
        if kept is not None:
            return kept[0], (kept[1].pow(-2) - layer.eps).clamp(min=0) * (count / (count - 1))
        mean, var = kernel_moments(input)
        return mean, var * (count / max(count - 1, 1))


def kept_statistics(layer: _BatchNorm, output: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the mean and ``1 / sqrt(biased variance + eps)`` that the kernel has kept of the batch behind `output`;
    None if that is not known, or not the batch that the layer normalises with."""
    if SYNCHRONISED in layer.__dict__:
        return None
    # Another class may do more in its forward than call the kernel once.
    known = type(layer).forward in _KERNEL_FORWARDS and "forward" not in layer.__dict__
    return saved_statistics(output) if known or getattr(type(layer), "takes_mask", False) else None


_KERNEL_FORWARDS = (nn.BatchNorm2d.forward,)  # which 1d and 3d inherit too


def synchronised_moments(layer: _BatchNorm) -> Moments | None:
    """The moments of the last batch of all ranks, if the layer normalises with that."""
    moments: Moments | None = layer.__dict__.get(SYNCHRONISED)
    return moments


def exclusive() -> AbstractContextManager[Any]:
    """Return a context that one thread is in at a time: two may run one layer. Compiled code has one thread."""
    return nullcontext() if torch.compiler.is_compiling() else _at_once


def advance(layer: _BatchNorm, averaging: Averaging, batch: Batch) -> None:
    """Let `averaging` take `batch` in and write the statistics it gives into the layer's buffers, in place.

    If another thread is in the middle of a forward of the layer's model, that forward's settlement does it, since it
    will write the buffers."""
    if not torch.compiler.is_compiling() and is_deferred(layer) and not in_transform():
        layer.__dict__[SCRATCH].updates.later.append((layer, averaging, batch))
        return
    with exclusive(), nullcontext() if torch.compiler.is_compiling() else torch.no_grad():
        _advance(layer, averaging, batch)


def _advance(layer: _BatchNorm, averaging: Averaging, batch: Batch) -> None:
    mean, var = running_statistics(layer)
    if is_replica(layer):
        if any(value.device != mean.device for value in averaging.state().values()):
            return  # `DataParallel` throws it away after the forward, buffers and all
    elif averaging.state() and not torch.compiler.is_compiling():
        if in_transform():
            raise RuntimeError(
                f"A batch norm with {averaging} runs inside a transform of torch.func, which can't carry its history. "
                "Use an averaging without one there, as convert_batch_norm(model), or paused_statistics(model)."
            )
        averaging.follow(mean)
    dtype = batch.mean.dtype
    running = mean.to(dtype), var.to(dtype)
    notify(layer, batch, running)
    mean, var = averaging.update(*running, per_channel(batch) if averaging.elementwise else batch)
    write(layer, mean, var, batch.valid)


def count_like(count: int | Tensor, moments: Tensor) -> Tensor:
    """Return the number of values per channel as `Batch` has it, (), in the dtype and on the device of its moments."""
    if isinstance(count, Tensor):
        return count.to(moments.dtype)
    return moments.new_full((), count)


def per_channel(batch: Batch) -> Batch:
    """Return the batch of one layer as an elementwise averaging is told of it."""
    count, step = batch.count.expand_as(batch.mean), batch.step.expand_as(batch.mean)
    return Batch(batch.mean, batch.var, count, step, None if batch.valid is None else batch.valid.expand_as(batch.mean))


def write(layer: _BatchNorm, mean: Tensor, var: Tensor, valid: Tensor | None) -> None:
    """Write new running statistics in place and count the batch, both only where `valid`; the device alone knows
    whether."""
    for buffer, value in zip(running_statistics(layer), (mean, var), strict=True):
        buffer.copy_(value if valid is None else torch.where(valid, value.to(buffer.dtype), buffer))
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1 if valid is None else valid)


def notify(layer: _BatchNorm, batch: Batch, running: tuple[Tensor, Tensor]) -> None:
    """Tell the layer's listeners of a batch that it settles by itself."""
    if not torch.compiler.is_compiling() and not in_transform() and (listeners := layer.__dict__.get(LISTENERS)):
        settled = Settled([layer], batch.mean, batch.var, batch.count.reshape(1), [True], running)
        for listener in listeners:
            listener(settled)


class Neighbours(list[Any]):
    """A list that a layer holds of objects around it, of which a copy of the layer gets an empty one: they know the
    original."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Neighbours:
        return Neighbours()

    def __reduce__(self) -> tuple[type[Neighbours], tuple[()]]:
        return Neighbours, ()


def listening(layers: Sequence[_BatchNorm], listener: Listener) -> Callable[[], None]:
    """Let `listener` be told of the batches of `layers`; return what ends that."""
    for layer in layers:
        layer.__dict__.setdefault(LISTENERS, Neighbours()).append(listener)

    def end() -> None:
        for layer in layers:
            listeners = layer.__dict__.get(LISTENERS, [])
            if listener in listeners:
                listeners.remove(listener)
            if not listeners:
                layer.__dict__.pop(LISTENERS, None)

    return end
