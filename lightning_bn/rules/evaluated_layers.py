"""What batch-norm layers get in the first batches of an evaluation, and how far their statistics are from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_bn.buffers import running_mean, running_var
from lightning_bn.discovery import BatchNormLayer, has_known_forward
from lightning_bn.error_boundary import UNBOUNDED, ErrorBoundary
from lightning_bn.layers.conversion import reads_running_mean
from lightning_bn.layers.settlement import rule_of
from lightning_bn.rules.fit import BatchSums, Effect, Running, batch_sums, effect
from lightning_bn.set_in_use import OtherSets
from lightning_bn.sharding import local_value


class EvaluatedLayers:
    """Hooks on the layers for the length of some batches; `close` removes them. Nothing waits for the device.

    Args:
        layers: the model's batch-norm layers.
        boundary: stands around every hook.
    """

    def __init__(self, layers: Sequence[BatchNormLayer], boundary: ErrorBoundary = UNBOUNDED) -> None:
        self._layers = layers
        self._boundary = boundary
        self._sets = OtherSets(layer.module for layer in layers)
        self.running: dict[int, Tensor] = {}  # (3, C): running mean and variance, affine weight, in the first forward
        self._sums: dict[int, list[tuple[int, int, Tensor]]] = {}  # images, values of a channel in each, `batch_sums`
        self._handles: list[RemovableHandle] = [
            layer.module.register_forward_pre_hook(boundary.guard(self._look(index)), with_kwargs=True)
            for index, layer in enumerate(layers)
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def effects(self, images: Mapping[int, int], frozen: Collection[int]) -> dict[int, Effect]:
        """Return how far each layer's statistics are from what it got, in the order in which the layers ran; waits for
        the device.

        Args:
            images: in a training batch, by layer; of one that is not there, the most of any.
            frozen: layers whose statistics training does not move.
        """
        usual = max(images.values(), default=1)
        found = {}
        for index, sums in self._sums.items():
            each = [self.running[index], *(part for _, _, part in sums)]
            running, *batches = torch.cat(each).cpu().split([len(part) for part in each])
            mean, var, weight = running
            if images and index not in images and not mean.any() and bool((var == 1).all()):
                continue  # training has not run it yet
            layer = self._layers[index].module
            # What a norm inherits and never reads stays where it began.
            unmoved = not has_known_forward(layer) and not mean.any()
            judged = effect(
                [BatchSums(n, values, *part) for (n, values, _), part in zip(sums, batches, strict=True)],
                Running(
                    mean,
                    var,
                    weight,
                    eps=layer.eps,
                    images=images.get(index, usual),
                    noise=0.0 if index in frozen else _noise(layer),
                    reads_mean=not unmoved or reads_running_mean(layer),
                ),
            )
            if judged is not None:
                found[index] = judged
        return found

    def vanishing(self) -> dict[int, list[int]]:
        """Return the channels of each layer whose running variance is below 10 eps while their input's, *unbiased*,
        in the first batch is 100 times as much; waits for the device."""
        found = {}
        for index, sums in self._sums.items():
            images, values, (_, biased, _, _) = sums[0]
            eps, var = self._layers[index].module.eps, self.running[index][1]
            input = biased * (images * values) / max(images * values - 1, 1)
            channels = ((var < 10 * eps) & (input > 100 * (var + eps))).nonzero().flatten().tolist()
            if channels:
                found[index] = channels
        return found

    def _look(self, index: int) -> Any:
        def look(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            input = args[0] if args else kwargs.get("input")
            if torch.compiler.is_compiling() or layer.training or not isinstance(input, Tensor):
                return
            if self._sets.of(layer) is not None:  # the last training batch, on which a misfit is judged, had no other
                return
            # Of other layouts of the statistics nothing is known.
            channels = input.shape[1] if input.dim() > 1 else None
            if layer.running_mean is None or running_mean(layer).shape != (channels,) or not input.numel():
                return
            with torch.no_grad():
                if index not in self.running:
                    mean = running_mean(layer).float()
                    weight = affine_weight(layer)
                    kept = weight if weight is not None and weight.shape == mean.shape else torch.ones_like(mean)
                    self.running[index] = torch.stack((mean, running_var(layer).float(), kept.float()))
                sums = batch_sums(input)
            self._sums.setdefault(index, []).append((len(input), input[0, 0].numel(), sums))

        return look


def affine_weight(layer: nn.Module) -> Tensor | None:
    """Return the part of the layer's affine weight that is on this rank, None where there is none."""
    weight = getattr(layer, "weight", None)
    return local_value(weight).detach() if isinstance(weight, Tensor) and not weight.is_meta else None


def _noise(layer: _BatchNorm) -> float:
    rule = rule_of(layer)
    momentum, size = getattr(rule, "momentum", None), getattr(rule, "size", None)
    if momentum is not None:
        return float(momentum / (2 - momentum))
    return 1 / size if isinstance(size, int) else 0.0
