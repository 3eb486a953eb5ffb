"""What one batch of an evaluation runs through: the weights at each layer, and the spread of its input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_bn.buffers import running_mean, running_var
from lightning_bn.discovery import BatchNormLayer
from lightning_bn.error_boundary import UNBOUNDED, ErrorBoundary
from lightning_bn.sharding import local_value

__all__ = ["EvaluationProbe", "Look", "far", "vanishing"]

LEAST_VALUES = 16
"""The variance of fewer values says little."""

FAR = 4.0
"""BN207: the variance of an evaluation's input is off by this factor, root mean square over channels, on a logarithmic
scale."""


class Look(NamedTuple):
    """One layer in one forward in eval mode: everything (C,), on the layer's device."""

    weight: Tensor | None
    mean: Tensor
    """The running mean at that moment."""
    var: Tensor
    """The running variance at that moment."""
    spread: Tensor
    """The *unbiased* variance of the layer's input."""


def far(probe: EvaluationProbe) -> dict[int, float]:
    """Return by what factor the *spread* of each layer's input is off, where its variance is off by `FAR`; the worst
    first."""
    found = {}
    for index, look in probe.looks.items():
        eps = probe.layers[index].module.eps
        off = ((look.spread + eps) / (look.var.float() + eps)).log().square().mean().sqrt().item()
        if off > math.log(FAR):
            found[index] = math.exp(off / 2)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def vanishing(probe: EvaluationProbe) -> dict[int, list[int]]:
    """Return the channels of each layer whose running variance is below 10 eps while their input varies 100 times as
    much."""
    found = {}
    for index, look in probe.looks.items():
        eps = probe.layers[index].module.eps
        channels = ((look.var < 10 * eps) & (look.spread > 100 * (look.var + eps))).nonzero().flatten().tolist()
        if channels:
            found[index] = channels
    return found


class EvaluationProbe:
    """Hooks for the length of one batch; `close` removes them. Nothing waits for the device.

    Args:
        layers: the model's batch-norm layers.
    """

    def __init__(self, layers: Sequence[BatchNormLayer], boundary: ErrorBoundary = UNBOUNDED) -> None:
        self.layers = layers
        self._boundary = boundary
        self.looks: dict[int, Look] = {}
        self.weights = {
            index: local_value(each.module.weight).clone()
            for index, each in enumerate(layers)
            if each.module.weight is not None
        }
        """The weights when the batch began, or of one that is spread over ranks the part that is here."""
        self._handles: list[RemovableHandle] = [
            layer.module.register_forward_pre_hook(self._look(index)) for index, layer in enumerate(layers)
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def exchanged(self) -> list[int]:
        """Return the layers that ran with other weights than they had when the batch began; waits for the device."""
        pairs = {
            index: (self.weights[index], look.weight)
            for index, look in self.looks.items()
            # In a forward the whole of a weight is here, of which there was only a part before.
            if look.weight is not None and look.weight.shape == self.weights[index].shape
        }
        return [index for index, (before, then) in pairs.items() if not torch.equal(before, then)]

    def _look(self, index: int) -> Any:
        def look(layer: _BatchNorm, args: tuple[Any, ...]) -> None:
            input = args[0] if args else None
            if torch.compiler.is_compiling() or layer.training or not isinstance(input, Tensor):
                return
            if layer.running_mean is None or input.dim() < 2 or input.numel() < LEAST_VALUES * input.shape[1]:
                return
            with torch.no_grad():
                over = [dim for dim in range(input.dim()) if dim != 1]
                weight = None if layer.weight is None else layer.weight.detach().clone()
                self.looks[index] = Look(
                    weight, running_mean(layer).clone(), running_var(layer).clone(), input.float().var(over)
                )

        return self._boundary.guard(look)
