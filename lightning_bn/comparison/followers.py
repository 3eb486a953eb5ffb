"""Several averages of the batch statistics, in addition to the one that a model's layers keep.

Running statistics are read by evaluation alone, so what a layer would hold under another average can be followed in the
same run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import compress
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging import Averaging, Batch, check_averaging
from lightning_bn.buffers import next_step, running_mean, running_statistics
from lightning_bn.discovery import find_batch_norms, unserved
from lightning_bn.error_boundary import UNBOUNDED, ErrorBoundary, guarded
from lightning_bn.layers.batch_norm import BatchNorm1d
from lightning_bn.layers.deferred import can_defer
from lightning_bn.layers.group import Collected, LayerGroup
from lightning_bn.layers.settlement import (
    Settled,
    advance,
    batch_moments,
    is_finite,
    kept_statistics,
    listening,
    rule_of,
    synchronised_moments,
)
from lightning_bn.layers.subclasses import input_and_mask
from lightning_bn.moments import Moments
from lightning_bn.ranks.synchronization import merge_over_ranks
from lightning_bn.set_in_use import OtherSets
from lightning_bn.torch_internals import backward_task, buffer_of_each, buffers_of, innermost_transform, is_compiled
from lightning_bn.torchscript import scriptable

# A batch of one layer: its mean, (C,); its unbiased variance, (C,), or the kernel's 1 / sqrt(biased variance + eps);
# values per channel; and whether it is what the kernel keeps.
_Moments: TypeAlias = tuple[Tensor, Tensor, "Tensor | int", bool]


class Followers:
    """For each average and each batch-norm layer of a model: the running statistics that the layer would keep under
    that average.

    All start from what the layers' buffers hold, as `convert_batch_norm` would, and see the batches that the layers see
    in training; the layers' own statistics, outputs and gradients are not touched. Non-finite batches are left out.

    Args:
        model: its batch-norm layers that keep running statistics are followed, of whatever class.
        averages: by the name each shall go under.

    Raises:
        TypeError: a value is not an Averaging.
        ValueError: the model has no layer that keeps running statistics.

    Cost: per average and forward of the model one update, for the channels of all layers together. No activation is
    read a second time where the kernel keeps a batch's moments.

    Example:
        >>> from lightning_bn import Window
        >>> layer = nn.BatchNorm1d(1, momentum=0.1)
        >>> followers = Followers(layer, {"window": Window(1)})
        >>> with followers.following():
        ...     _ = layer(torch.tensor([[19.0], [21.0]]))
        >>> with followers.applied("window"):
        ...     layer.running_mean.item()
        20.0
        >>> layer.running_mean.item()
        2.0
    """

    def __init__(
        self, model: nn.Module, averages: Mapping[str, Averaging], *, boundary: ErrorBoundary = UNBOUNDED
    ) -> None:
        for name, averaging in averages.items():
            check_averaging(averaging, f"Followers(model, {{{name!r}: {averaging!r}}})")
        self._layers = {layer.name: layer.module for layer in find_batch_norms(model) if layer.tracks}
        if not self._layers:
            raise ValueError(
                "Followers(model, ...): the model has no batch-norm layer that keeps running statistics."
                + unserved(model, constant=True)
            )
        # A shadow is a layer that is never called: it holds what `advance` writes into, and saves and loads it.
        self._shadows = {
            name: {path: _shadow(layer, averaging) for path, layer in self._layers.items()}
            for name, averaging in averages.items()
        }
        self._averages = dict(averages)
        self._paths = {layer: path for path, layer in self._layers.items()}
        self._model = model
        self._boundary = boundary
        self._sets = OtherSets(self._layers.values())
        self._seen: set[_BatchNorm] = set()
        self._traced: set[str] = set()
        self._pending: dict[_BatchNorm, _Moments] = {}
        self._sizes = {layer: len(running_mean(layer)) for layer in self._paths}  # channels of the shadows
        self._wide: list[_Wide] = []
        self._counts = {
            path: layer.num_batches_tracked.clone()
            for path, layer in self._layers.items()
            if layer.num_batches_tracked is not None
        }

    @contextmanager
    def following(self) -> Iterator[None]:
        """Take in every training batch that reaches the layers."""
        self._wide = self._side_by_side()
        layers = list(self._layers.values())
        self._sets.rest()
        with ExitStack() as stack:
            stack.callback(scriptable(self._model))
            stack.callback(listening([layer for layer in layers if can_defer(layer)], self._settled))
            for path, layer in self._layers.items():
                stack.callback(layer.register_forward_hook(self._hook(path, layer), with_kwargs=True).remove)
            try:
                yield
            finally:
                self._flush()

    def _side_by_side(self) -> list[_Wide]:
        """Those layers together whose shadows have the same dtype and device."""
        alike: dict[tuple[torch.dtype, torch.device], list[str]] = {}
        for path, shadow in next(iter(self._shadows.values()), {}).items():
            mean = running_mean(shadow)
            alike.setdefault((mean.dtype, mean.device), []).append(path)
        rows = self._shadows.values()
        return [
            _Wide([self._layers[p] for p in paths], [[r[p] for p in paths] for r in rows]) for paths in alike.values()
        ]

    def _renew_if_resized(self, layers: Sequence[_BatchNorm]) -> None:
        """Begin anew with the layers whose channels are others than before, as structured pruning leaves them."""
        # In loops that run no Python for each layer: this is asked at every step.
        if list(map(len, buffer_of_each(layers, "running_mean"))) == list(map(self._sizes.get, layers)):
            return
        for layer in layers:
            path, size = self._paths.get(layer), len(running_mean(layer))
            if path is None or self._sizes[layer] == size:
                continue
            self._sizes[layer] = size
            warnings.warn(f"{path} has another number of channels: its averages begin anew.", stacklevel=2)
            self._pending.pop(layer, None)
            self._flush()
            for name, averaging in self._averages.items():
                self._shadows[name][path] = _shadow(layer, averaging)
            self._wide = self._side_by_side()

    def missed(self) -> list[str]:
        """Return the names of layers that took in batches of which nothing was seen here; waits for the device.

        Code that `torch.compile` made before there were hooks never calls them. The statistics of an averaged copy,
        such as a teacher or a target network, are written by whoever averages, and not by batches.
        """
        if not is_compiled(self._model):
            return []
        return [
            path
            for path, before in self._counts.items()
            if not self._follows(path)
            and self._layers[path].training
            and bool(self._layers[path].num_batches_tracked != before)
        ]

    def _follows(self, path: str) -> bool:
        """Whether batches of the layer were seen; what is written into any other one is not an average of batches."""
        return path in self._traced or self._layers[path] in self._seen

    @contextmanager
    @torch.no_grad()
    def applied(self, name: str) -> Iterator[None]:
        """Let the layers that training runs hold the statistics of the average `name`, in place; at exit they hold
        their own again."""
        self._flush()
        followed = {path: layer for path, layer in self._layers.items() if self._follows(path)}
        before = [(buffer, buffer.clone()) for layer in followed.values() for buffer in running_statistics(layer)]
        try:
            for path, layer in followed.items():
                _copy(self._shadows[name][path], layer)
            yield
        finally:
            for buffer, value in before:
                buffer.copy_(value)

    def state_dict(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """Return, by average and layer, all that the averages need to go on."""
        self._flush()
        return {
            name: {
                path: {key: held.detach().clone() for key, held in shadow.state_dict().items()}
                for path, shadow in row.items()
            }
            for name, row in self._shadows.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> None:
        """Take over what `state_dict` returned; an average or a layer that is not in it keeps what it holds."""
        self._flush()
        for name, row in self._shadows.items():
            for path, shadow in row.items():
                if path in state.get(name, {}):
                    shadow.load_state_dict(state[name][path])
                    count = self._layers[path].num_batches_tracked
                    if count is None or bool(shadow.num_batches_tracked == count):
                        self._seen.add(self._layers[path])

    @guarded
    def _settled(self, settled: Settled) -> None:
        """Take in what layers of this package have settled, in the set of statistics that is followed."""
        ran, is_own = list(settled.ran), not self._sets.are_in_use()
        if not is_own:
            ran = [has_run and self._sets.of(layer) is None for layer, has_run in zip(settled.layers, ran, strict=True)]
        self._seen.update(compress(settled.layers, ran))
        self._renew_if_resized(settled.layers)
        for wide in self._wide:
            if is_own and wide.layers == settled.layers:
                wide.take(settled.mean, settled.var, settled.count)
                return
        sizes = [len(running_mean(layer)) for layer in settled.layers]
        pieces = zip(settled.mean.split(sizes), settled.var.split(sizes), settled.count.unbind(), strict=True)
        for layer, has_run, (mean, var, count) in zip(settled.layers, ran, pieces, strict=True):
            if has_run:
                if layer in self._pending:
                    self._flush()
                self._pending[layer] = mean, var, count, False

    def _hook(self, path: str, layer: _BatchNorm) -> Any:
        """Return what sees a layer of plain torch, and a compiled layer of any class: `torch.compile` makes it part of
        its code, in which every layer settles by itself, and so do its shadows."""
        shadows = [row[path] for row in self._shadows.values()]
        is_told = can_defer(layer)
        # Not `guarded`, which asks whether anything is compiled, for each layer at each step.
        attempt: Callable[..., Any] = self._boundary.attempt
        see = self._see if self._boundary is UNBOUNDED else partial(attempt, "", self._see)

        def while_training(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if not (layer.training and layer.track_running_stats):
                return
            if not torch.compiler.is_compiling():
                if not is_told:
                    see(layer, args, kwargs, output)
            elif self._sets.of(layer) is None:
                self._traced.add(path)
                input, mask = input_and_mask(layer, args, kwargs)
                _settle_each(shadows, Moments.of(input.detach(), mask))

        return while_training

    def _see(self, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Note down the batch of a layer of plain torch. It is kept until the layer has another one, or somebody reads:
        then those of all layers are taken in."""
        # Few functions, since a step comes here for each layer: as `in_backward` and `in_transform` have it.
        if backward_task() != -1 or innermost_transform() is not None:
            return
        if self._sets.are_several and self._sets.of(layer) is not None:
            return
        if buffers_of(layer)["running_mean"].shape[0] != self._sizes[layer]:  # type: ignore[union-attr]
            self._renew_if_resized([layer])
        self._seen.add(layer)
        kept = kept_statistics(layer, output)
        if kept is not None:
            moments: _Moments = (*kept, output.numel() // output.shape[1], True)
        else:
            moments = (*_moments(layer, *input_and_mask(layer, args, kwargs), output), False)
        if layer in self._pending:
            self._flush()
        self._pending[layer] = moments

    @torch.no_grad()
    def _flush(self) -> None:
        pending, self._pending = self._pending, {}
        for wide in self._wide:
            wide.take_each(pending)


class _Wide:
    """The shadows of `layers` under each average, each average's as one wide layer."""

    def __init__(self, layers: list[_BatchNorm], shadows: list[list[BatchNorm1d]]) -> None:
        self.layers = layers
        self._groups = [
            LayerGroup(row, [rule_of(shadow) for shadow in row], skip_nonfinite=True, private=True) for row in shadows
        ]
        like = running_mean(shadows[0][0])
        self._eps = torch.tensor([layer.eps for layer in layers], dtype=like.dtype, device="cpu").to(
            like.device, non_blocking=True
        )
        nothing = [torch.zeros(len(running_mean(layer)), dtype=like.dtype, device=like.device) for layer in layers]
        self._absent: list[_Moments] = [(none, none, 0, False) for none in nothing]

    def take_each(self, pending: Mapping[_BatchNorm, _Moments]) -> None:
        """Take in the batches of those layers that ran."""
        if pending.keys().isdisjoint(self.layers):
            return
        means, variances, values, kept = zip(*map(pending.get, self.layers, self._absent), strict=True)
        first = self._groups[0]
        mean, var = torch.cat((*means, *variances)).to(first.dtype).chunk(2)
        count = first.numbers(values)
        self.take(mean, self._variances(var, count, kept), count)

    def _variances(self, var: Tensor, count: Tensor, kept: tuple[bool, ...]) -> Tensor:
        """Make variances of what the kernel has kept, for all layers together."""
        if not any(kept):
            return var
        first = self._groups[0]
        values = first.widened(count)
        of_kept = (var.pow(-2) - first.widened(self._eps)).clamp(min=0) * (values / (values - 1))
        return of_kept if all(kept) else torch.where(first.widened(first.flags(kept)), of_kept, var)

    @torch.no_grad()
    def take(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Take in the batches of all layers, a layer's being left out where it has no variance or is not finite."""
        first = self._groups[0]
        mean, var = mean.to(first.dtype), var.to(first.dtype)
        rows = Collected(mean, var, count.to(first.dtype), (count > 1) & first.finite(var))
        for group in self._groups:
            group.settle(rows)


@torch.no_grad()
def _moments(
    layer: _BatchNorm, input: Tensor, mask: Tensor | None, output: Tensor
) -> tuple[Tensor, Tensor, Tensor | int]:
    """Mean, *unbiased* variance and count of what the layer's own statistics take in: the batch, or that of all ranks
    if it is synchronised."""
    moments = synchronised_moments(layer)
    if (
        isinstance(layer, nn.SyncBatchNorm)
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    ):
        (moments,) = merge_over_ranks([Moments.of(input, mask)], layer.process_group)
    elif moments is None and (mask is not None or not input.numel()):
        moments = Moments.of(input, mask)
    if moments is None:
        return (*batch_moments(layer, input, output), input.numel() // len(running_mean(layer)))
    return moments.mean, moments.variance(unbiased=True), moments.count.reshape(())


@torch.no_grad()
def _settle_each(shadows: list[BatchNorm1d], moments: Moments) -> None:
    var = moments.variance(unbiased=True)
    valid = is_finite(var) & (moments.count > 1)
    for shadow in shadows:
        advance(shadow, rule_of(shadow), Batch(moments.mean, var, moments.count, next_step(shadow), valid))


def _shadow(layer: _BatchNorm, averaging: Averaging) -> BatchNorm1d:
    mean = running_mean(layer)
    dtype = torch.promote_types(mean.dtype, torch.float32)
    shadow = BatchNorm1d(len(running_mean(layer)), affine=False, device=mean.device, dtype=dtype, averaging=averaging)
    _copy(layer, shadow)
    if layer.num_batches_tracked is not None and shadow.num_batches_tracked is not None:
        shadow.num_batches_tracked.copy_(layer.num_batches_tracked)
    return shadow


def _copy(source: _BatchNorm, target: _BatchNorm) -> None:
    """Write the running statistics of one layer into another's, in place."""
    for buffer, value in zip(running_statistics(target), running_statistics(source), strict=True):
        buffer.copy_(value)
