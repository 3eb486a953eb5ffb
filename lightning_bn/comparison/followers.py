"""Several averages of the batch statistics beside the one that a model's layers keep themselves.

Running statistics are read by evaluation alone, so what a layer would hold under another average can be followed in the same run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging import Averaging, Batch
from lightning_bn.discovery import find_batch_norms
from lightning_bn.layers.batch_norm import BatchNorm1d, check_averaging, input_and_mask
from lightning_bn.layers.settlement import advance, is_deferred, is_finite, is_synchronised
from lightning_bn.moments import Moments
from lightning_bn.ranks.synchronization import merge_over_ranks
from lightning_bn.torch_internals import in_backward, kernel_moments

__all__ = ["Followers"]


class Followers:
    """For each average and each batch-norm layer of a model: the running statistics that the layer would keep under that average.

    All start from what the layers' buffers hold, as `convert_batch_norm` would, and see the batches that the layers see in
    training; the layers' own statistics, outputs and gradients are not touched. Non-finite batches are left out.

    Args:
        model: its batch-norm layers that keep running statistics are followed, of whatever class.
        averages: by the name each shall go under.

    Raises:
        TypeError: a value is not an Averaging.
        ValueError: the model has no layer that keeps running statistics.

    Cost: per layer and training batch one pass over the layer's input for its moments, and one update per average on (C,) vectors.

    Example:
        >>> from lightning_bn import Cumulative, Window
        >>> layer = nn.BatchNorm1d(1, momentum=0.1)
        >>> followers = Followers(layer, {"window": Window(1), "all": Cumulative()})
        >>> with followers.following():
        ...     for value in (10.0, 20.0):
        ...         _ = layer(torch.tensor([[value - 1], [value + 1]]))
        >>> with followers.applied("window"):
        ...     layer.running_mean.item()
        20.0
        >>> with followers.applied("all"):
        ...     layer.running_mean.item()
        15.0
        >>> round(layer.running_mean.item(), 4)
        2.9
    """

    def __init__(self, model: nn.Module, averages: Mapping[str, Averaging]) -> None:
        for name, averaging in averages.items():
            check_averaging(averaging, f"Followers(model, {{{name!r}: {averaging!r}}})")
        self._layers = {layer.name: layer.module for layer in find_batch_norms(model) if layer.tracks}
        if not self._layers:
            raise ValueError("Followers(model, ...): the model has no batch-norm layer that keeps running statistics.")
        # A shadow is a layer that is never called: it holds what `advance` writes into, and saves and loads it.
        self._shadows = {
            name: {path: _shadow(layer, averaging) for path, layer in self._layers.items()} for name, averaging in averages.items()
        }
        self._seen: set[str] = set()
        self._counts = {
            path: layer.num_batches_tracked.clone() for path, layer in self._layers.items() if layer.num_batches_tracked is not None
        }

    @contextmanager
    def following(self) -> Iterator[None]:
        """Take in every training batch that reaches the layers."""
        handles = [layer.register_forward_hook(self._hook(path), with_kwargs=True) for path, layer in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def missed(self) -> list[str]:
        """Return the names of layers that took in batches of which nothing was seen here; waits for the device.

        Code that `torch.compile` made before there were hooks never calls them.
        """
        return [
            path
            for path, before in self._counts.items()
            if path not in self._seen and bool(self._layers[path].num_batches_tracked != before)
        ]

    @contextmanager
    @torch.no_grad()
    def applied(self, name: str) -> Iterator[None]:
        """Let the layers hold the statistics of the average `name`, in place; at exit they hold their own again."""
        before = [(layer, layer.running_mean.clone(), layer.running_var.clone()) for layer in self._layers.values()]
        try:
            for path, layer in self._layers.items():
                shadow = self._shadows[name][path]
                layer.running_mean.copy_(shadow.running_mean)
                layer.running_var.copy_(shadow.running_var)
            yield
        finally:
            for layer, mean, var in before:
                layer.running_mean.copy_(mean)
                layer.running_var.copy_(var)

    def state_dict(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """Return, by average and layer, all that the averages need to go on."""
        return {name: {path: _copied(shadow.state_dict()) for path, shadow in row.items()} for name, row in self._shadows.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> None:
        """Take over what `state_dict` returned; an average or a layer that is not in it keeps what it holds."""
        for name, row in self._shadows.items():
            for path, shadow in row.items():
                if path in state.get(name, {}):
                    shadow.load_state_dict(state[name][path])

    def _hook(self, path: str) -> Any:
        shadows = [row[path] for row in self._shadows.values()]

        def take(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if layer.training and layer.track_running_stats and not in_backward():
                self._seen.add(path)
                _take(shadows, _moments(layer, *input_and_mask(layer, args, kwargs)))

        return take


@torch.no_grad()
def _take(shadows: list[BatchNorm1d], moments: Moments) -> None:
    var = moments.variance(unbiased=True)
    valid = is_finite(var) & (moments.count > 1)
    for shadow in shadows:
        advance(shadow, shadow.averaging, Batch(moments.mean, var, moments.count, shadow.num_batches_tracked + 1, valid))


@torch.no_grad()
def _moments(layer: _BatchNorm, input: Tensor, mask: Tensor | None) -> Moments:
    """The moments of what the layer's own statistics take in: the batch, or that of all ranks where the layer is synchronised."""
    if mask is None and input.numel():
        mean, var = kernel_moments(input)
        count = torch.full((), input.numel() // input.shape[1], dtype=mean.dtype, device=mean.device)
        moments = Moments(count, mean, var * count)
    else:
        moments = Moments.of(input, mask)
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks > 1 and (is_synchronised(layer) or is_deferred(layer) or isinstance(layer, nn.SyncBatchNorm)):
        dtype = moments.mean.dtype
        (merged,) = merge_over_ranks([moments], getattr(layer, "process_group", None))
        moments = Moments(merged.count.reshape(()).to(dtype), merged.mean.to(dtype), merged.m2.to(dtype))
    return moments


def _shadow(layer: _BatchNorm, averaging: Averaging) -> BatchNorm1d:
    dtype = torch.promote_types(layer.running_mean.dtype, torch.float32)
    shadow = BatchNorm1d(layer.num_features, affine=False, device=layer.running_mean.device, dtype=dtype, averaging=averaging)
    shadow.running_mean.copy_(layer.running_mean)
    shadow.running_var.copy_(layer.running_var)
    if layer.num_batches_tracked is not None:
        shadow.num_batches_tracked.copy_(layer.num_batches_tracked)
    return shadow


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}
