"""Batch norm over the batches of all ranks, for any class of layer, without replacing one.

A layer's own forward runs with another meaning of ``F.batch_norm``: a `TorchFunctionMode` around it exchanges that one
call for the synchronised computation. So torch's layers, this package's, and subclasses with a forward of their own are
all supported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lightning_bn.discovery import find_batch_norms, parts_called_by
from lightning_bn.layers.deferred import can_defer
from lightning_bn.layers.masks import masked_batch_norm
from lightning_bn.layers.settlement import MERGED, SYNCHRONISED
from lightning_bn.layers.subclasses import observe
from lightning_bn.moments import Moments
from lightning_bn.ranks.collective import Group, Ranks, naming_failures
from lightning_bn.ranks.merging import MergedUpdates


def merge_over_ranks(parts: Sequence[Moments], group: Group = None) -> list[Moments]:
    """Return each of `parts` merged with those of the other ranks, in the widest dtype: one all_gather for all of them.

    Every rank merges in the order of the ranks, so that all results are bit-identical. A rank without data has empty
    moments.
    """
    own = [part.wide().to_row() for part in parts]
    rows = _of_every_rank(torch.cat(own), group)
    merged = []
    for pieces in zip(*(each.split([len(piece) for piece in own]) for each in rows), strict=True):
        total = Moments.from_row(pieces[0])
        for piece in pieces[1:]:
            total = total.merge(Moments.from_row(piece))
        merged.append(total)
    return merged


class _NormaliseOverRanks(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with the moments of all ranks; one all_gather forward, one
    all_reduce backward."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: Group,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with naming_failures(
            "BatchNormSync", "in a layer's forward", "Layers that ran before it have taken this batch."
        ):
            (moments,) = merge_over_ranks([Moments.of(input, mask, wide=True)], group)
        count = moments.count.reshape(())
        invstd = torch.rsqrt(moments.m2 / count.clamp(min=1) + eps)
        normalised = _scaled(_centred(input, moments.mean, mask), invstd, weight, bias, mask)
        ctx.group, ctx.mask = group, mask
        ctx.save_for_backward(input, weight, moments.mean, invstd, count)
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(count, moments.mean, moments.m2)
        return normalised.to(input.dtype), count, moments.mean, moments.m2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, invstd, count = ctx.saved_tensors
        over = [dim for dim in range(input.dim()) if dim != 1]
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if ctx.mask is not None:
            gradient = torch.where(ctx.mask.unsqueeze(1), gradient, 0.0)
        xhat = _scaled(_centred(input, mean, ctx.mask), invstd, None, None, ctx.mask)
        own = torch.stack((gradient.sum(over), (gradient * xhat).sum(over)))
        total = own.clone()
        with naming_failures("BatchNormSync", "in backward, while the ranks were adding up their gradients"):
            dist.all_reduce(total, group=ctx.group)
        shift, scale = (total / count.clamp(min=1)).to(gradient.dtype)
        factor = (invstd if weight is None else invstd * weight).to(gradient.dtype)
        inward = _along(factor, input) * (gradient - _along(shift, input) - xhat * _along(scale, input))
        if ctx.mask is not None:
            inward = torch.where(ctx.mask.unsqueeze(1), inward, 0.0)
        return (
            inward.to(input.dtype),
            None,
            None if weight is None else own[1].to(weight.dtype),
            own[0].to(mean.dtype if weight is None else weight.dtype) if ctx.has_bias else None,
            None,
            None,
        )


def _along(values: Tensor, like: Tensor) -> Tensor:
    """Shape values per channel so that they broadcast over `like`, (N, C, *spatial)."""
    return values.reshape(1, -1, *[1] * (like.dim() - 2))


def _centred(input: Tensor, mean: Tensor, mask: Tensor | None) -> Tensor:
    input = input.to(torch.promote_types(input.dtype, torch.float32))
    centred = input - _along(mean, input).to(input.dtype)
    return centred if mask is None else torch.where(mask.unsqueeze(1), centred, 0.0)


def _scaled(centred: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    factor = invstd if weight is None else invstd * weight
    output = centred * _along(factor, centred).to(centred.dtype)
    if bias is not None:
        output = output + _along(bias, centred).to(centred.dtype)
    return output if mask is None else torch.where(mask.unsqueeze(1), output, 0.0)


class _OverRanks(TorchFunctionMode):
    """Inside, a training ``F.batch_norm`` normalises with the batch of all ranks, and averages that one's moments."""

    def __init__(self, layer: _BatchNorm, group: Group) -> None:
        super().__init__()
        self._layer, self._group = layer, group

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        if func is masked_batch_norm:
            return self._normalise(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        output, moments = self._normalise(input, None, weight, bias, eps)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                for buffer, value in ((running_mean, moments.mean), (running_var, moments.variance(unbiased=True))):
                    # What the kernel does; lerp would keep a NaN out of a momentum of 0 and let it into one of 1.
                    buffer.copy_((1 - momentum) * buffer + momentum * value)
        return output

    def _normalise(
        self, input: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Moments]:
        output, count, mean, m2 = _NormaliseOverRanks.apply(  # type: ignore[no-untyped-call]
            input, mask, weight, bias, eps, self._group
        )
        dtype = torch.promote_types(input.dtype, torch.float32)
        moments = Moments(count.to(dtype), mean.to(dtype), m2.to(dtype))
        self._layer.__dict__[SYNCHRONISED] = moments.detach()
        return output, moments


class _SynchronisedForward:
    """A layer's forward, run in a mode in which its batch is that of all ranks."""

    def __init__(self, layer: _BatchNorm, group: Group, before: Mapping[str, Any]) -> None:
        self.before = before  # the forward that the layer had as an attribute of its own, if it had one
        self._layer, self._group = layer, group

    @property
    def follows_class(self) -> bool:
        """Whether it runs the forward of the layer's class, whatever that is by now: a layer may be converted
        meanwhile."""
        return not self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer
        forward = self.before["forward"] if self.before else partial(type(layer).forward, layer)
        if not layer.training:
            # A layer without running statistics normalises with its batch in eval too, where ranks may have unequal
            # numbers of batches.
            return forward(*args, **kwargs)
        with _OverRanks(layer, self._group):
            return forward(*args, **kwargs)


def synchronise(layer: _BatchNorm, group: Group = None) -> Callable[[], None]:
    """Let `layer` normalise, in training, with the batches of all ranks of `group`, and average their moments.

    The layer stays the same object of the same class. Every rank must run it equally often; a rank may have an empty
    batch.

    Args:
        layer: torch's, this package's or anybody's; masks are honoured.
        group: the process group, None for the default one.

    Returns:
        A function that leaves the layer as it was.
    """
    before = {name: value for name, value in layer.__dict__.items() if name == "forward"}
    during = {SYNCHRONISED: None, "forward": _SynchronisedForward(layer, group, before)}
    layer.__dict__.update(during)
    return partial(_exchange, layer, during, before)


def merge_statistics(model: nn.Module, group: Group = None, *, counted: bool = True) -> Callable[[], None]:
    """Let each rank normalise with its own batch, and every rank's running statistics be those of the batches of all.

    A step's batches are merged at the end of the forward of `model`, by count: the running variance has the *unbiased*
    variance of the ranks' batches taken together, the spread between the ranks included. One all_reduce a forward, and
    one more in the first.

    Args:
        model: its forward is the unit after which ranks meet; where a step calls its parts and not the model, as a
            LightningModule may, that of each part. Every rank must call them equally often.
        group: the process group, None for the default one.
        counted: whether this rank's batches count.

    Returns:
        A function that leaves the model as it was.
    """
    ranks = Ranks(group, task="BatchNormSync", afterwards="The running statistics are those before this batch.")
    layers = [layer.module for layer in find_batch_norms(model) if layer.module.running_mean is not None]
    ends = [observe(layer) for layer in layers if not can_defer(layer)]
    for layer in layers:
        layer.__dict__[MERGED] = True
    merged = []
    for part in dict.fromkeys([model, *parts_called_by(model)]):
        inside = [layer.module for layer in find_batch_norms(part) if layer.module.running_mean is not None]
        if inside:
            merged.append(MergedUpdates(inside, ranks.add_up, counted=counted))
            merged[-1].attach(part)

    def undo() -> None:
        for updates in merged:
            updates.detach()
        for layer in layers:
            layer.__dict__.pop(MERGED, None)
        for end in ends:
            end()

    return undo


def _of_every_rank(tensor: Tensor, group: Group) -> list[Tensor]:
    tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(tensors, tensor, group=group)
    return tensors


@contextmanager
def unsynchronised(layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Let each of `layers` run by itself for the block, as it did before `synchronise`; any other layer stays as it
    is."""
    with ExitStack() as stack:
        for layer in layers:
            forward = layer.__dict__.get("forward")
            if isinstance(forward, _SynchronisedForward):
                during = {SYNCHRONISED: layer.__dict__[SYNCHRONISED], "forward": forward}
                _exchange(layer, during, forward.before)
                stack.callback(_exchange, layer, forward.before, during)
        yield


def _exchange(layer: _BatchNorm, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Take the entries of `old` out of the layer's attributes and put those of `new` in."""
    for name in old:
        layer.__dict__.pop(name, None)
    layer.__dict__.update(new)
