"""Hooks that read the moments of what goes into a batch-norm layer, and choose the statistics by which the layer
normalises it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.buffers import running_mean, running_statistics, running_var
from lightning_bn.channel_moments import channel_moments
from lightning_bn.discovery import has_known_forward
from lightning_bn.layers.conversion import why_unsupported
from lightning_bn.layers.subclasses import input_and_mask
from lightning_bn.modes import kept_attribute
from lightning_bn.moments import Moments
from lightning_bn.ranks.synchronization import unsynchronised
from lightning_bn.recalibration.tally import BatchMoments
from lightning_bn.set_in_use import OtherSets

OnInput = Callable[[int, BatchMoments], tuple[Tensor, Tensor]]
"""Called with a layer's place in the list and what goes into it; returns the mean and the variance to normalise with,
(C,) each."""


@contextmanager
def measured(layers: Sequence[_BatchNorm], on_input: OnInput, *, one_by_one: bool = True) -> Iterator[None]:
    """Call `on_input` with what goes into each call of `layers`, which then normalises with what it returned. The
    layers are in eval mode, so that they use the buffers they are given.

    The layers' own buffers are not written: other tensors stand in their place, and whoever calls this puts them back
    (`kept`). Where a forward uses another set of statistics than is in place now, a layer normalises with that, and
    nothing is called.

    Args:
        layers: to be measured.
        on_input: see `OnInput`.
        one_by_one: whether a batch's forward ends before the next one's begins.

    Raises:
        ValueError: in a forward, for one that uses another set while others wait.
    """
    sets = OtherSets(layers)
    with ExitStack() as stack:
        # Ranks may run unequal numbers of batches, and what they see is merged by whoever calls this.
        stack.enter_context(unsynchronised(layers))
        for place, layer in enumerate(layers):
            hook = _hook(place, layer, on_input, sets, one_by_one=one_by_one)
            handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def normalising_with_batches(layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Let batch-norm layers in eval mode normalise with each batch's own mean and *biased* variance.

    No running statistics move and no rank waits for another. An input with one value a channel has no variance and is
    normalised with the running statistics, as ever in eval.

    Args:
        layers: those that keep running statistics; their buffers are as before at exit.
    """
    held = [(layer, *running_statistics(layer)) for layer in layers]
    before = [(mean.clone(), var.clone()) for _, mean, var in held]  # DDP may write into them inside

    def of_batch(place: int, row: BatchMoments) -> tuple[Tensor, Tensor]:
        mean, var = before[place]
        if isinstance(row.values, Tensor):
            several = row.values > 1
            return torch.where(several, row.mean, mean), torch.where(several, row.var, var)
        return (row.mean, row.var) if row.values > 1 else (mean, var)

    with ExitStack() as stack:
        stack.enter_context(measured(layers, of_batch))
        for layer, mean, var in held:
            # Whoever looks at the layer between its forwards finds its buffers.
            shown = partial(_show, mean=mean, var=var)
            stack.callback(layer.register_forward_hook(shown, always_call=True).remove)
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, mean, var), (old_mean, old_var) in zip(held, before, strict=True):
                    mean.copy_(old_mean)
                    var.copy_(old_var)


def _show(layer: _BatchNorm, args: Any, output: Any, *, mean: Tensor, var: Tensor) -> None:
    _put(layer, mean, var)


def _put(layer: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    own = vars(layer).get("_buffers", {})  # not `buffers_of`, which gives a copy where torch has no such dict
    if own.get("running_mean") is None:  # by a layer's own way
        layer.running_mean, layer.running_var = mean, var
    else:  # what torch does when they are assigned takes ten times as long
        own.update(running_mean=mean, running_var=var)


def _hook(
    place: int, layer: _BatchNorm, on_input: OnInput, sets: OtherSets, *, one_by_one: bool
) -> Callable[..., None]:
    measure = _of_input if normalises_its_input(layer) else _by_own_forward
    # Written over and over: small tensors that are kept between large ones break the heap up, and the model waits for
    # new pages.
    stand_ins = tuple(torch.empty_like(buffer) for buffer in running_statistics(layer))

    def hook(module: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (other := sets.of(module)) is not None:
            if one_by_one:
                return
            raise ValueError(
                f"recalibrate(exact=True): the forward uses the set {other!r} on its way, which is the same for all "
                "batches that are in their forwards at once. Leave out exact=True, or recalibrate a part of the model "
                "that uses one set."
            )
        with_graph = torch.is_grad_enabled()
        with torch.no_grad():
            row = measure(module, args, kwargs)
            if row is None:
                return
            statistics = on_input(place, row)
            # A forward that turned grad on may go backward, and then needs the ones it ran with.
            mean, var = (torch.empty_like(one) for one in stand_ins) if with_graph else stand_ins
            mean.copy_(statistics[0])
            var.copy_(statistics[1])
        # Others may have exchanged the buffers meanwhile: what gives an average to a subclass does so in each of its
        # calls.
        if module.running_mean is not mean:
            _put(module, mean, var)

    return hook


def normalises_its_input(layer: _BatchNorm) -> bool:
    """Whether the layer's forward normalises its input as it comes, channel by channel."""
    if has_known_forward(layer):
        return True
    try:
        return why_unsupported(layer) is None
    except Exception:  # a layer that can't be copied for the trial can still be asked by its own forward
        return False


def _of_input(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchMoments | None:
    input, mask = input_and_mask(layer, args, kwargs)
    if input.is_nested:
        raise TypeError(
            "a batch norm got a nested tensor (torch.nested), whose samples differ in length, as torch takes none. "
            "Give it their values: forward=lambda model, batch: model(torch.cat(batch.unbind()))."
        )
    if input.numel() == 0:
        return None
    if mask is None:
        return BatchMoments(len(input), input.numel() // input.shape[1], *channel_moments(input))
    moments = Moments.of(input, mask)
    return BatchMoments(len(input), moments.count, moments.mean, moments.m2 / moments.count.clamp(min=1))


def _by_own_forward(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchMoments | None:
    """Let the layer's own training forward leave the moments in scratch buffers: it may permute, reshape or split what
    it gets."""
    input = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    if input.numel() == 0:
        return None
    # A variance that no data has: still there afterwards, nothing was written. (The kernel does not count its writes in
    # ``_version``.)
    mean, var = torch.zeros_like(running_mean(layer)), torch.full_like(running_var(layer), -1.0)
    instead = {
        **(
            {"averaging": None} if hasattr(layer, "averaging") else {}
        ),  # a subclass of this package's layer; it sees no batch
        "training": True,
        "track_running_stats": True,
        "momentum": 1.0,
        "running_mean": mean,
        "running_var": var,
        "num_batches_tracked": torch.zeros((), dtype=torch.int64, device=mean.device),
    }
    with ExitStack() as stack:
        for name, value in instead.items():
            stack.enter_context(kept_attribute([layer], name))
            setattr(layer, name, value)
        layer.forward(*args, **kwargs)
    if (var < 0).any():
        raise TypeError(
            f"{type(layer).__name__}'s forward does not leave the statistics of the batch in its buffers, so they "
            "can't be told. Leave it out: recalibrate(model, batches, layers=lambda name, module: not "
            f"isinstance(module, {type(layer).__name__}))."
        )
    count = input.numel() // layer.num_features
    return BatchMoments(len(input), count, mean, var * (count - 1) / count)
