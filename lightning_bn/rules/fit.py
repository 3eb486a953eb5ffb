"""How far running statistics are from what layers get: the arithmetic, on the host in float64, and the hooks that read
the first batches of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
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
from lightning_bn.moments import Moments
from lightning_bn.set_in_use import OtherSets
from lightning_bn.sharding import local_value

LIMIT = 0.5
"""An effect whose lower bound is beyond it is one: the layer's output is off by half of its own standard deviation."""

NOTICEABLE = 0.15
"""An effect that matters where it changes answers: several layers that are off by as much may add up."""

_LEAST_IMAGES = 4
_DEAD = 10.0  # times eps: a channel with less variance is constant in training and in evaluation


@dataclass(frozen=True)
class BatchSums:
    """The input of a layer in one forward, per channel."""

    images: int
    values: int
    """Values of a channel in one image."""
    mean: Tensor  # (C,), of the batch
    second: Tensor  # (C,), mean over images of their second moment about `mean`: the *biased* variance of the batch
    between: Tensor  # (C,), sum over images of the squared deviation of their mean from `mean`
    spread: Tensor  # (C,), sum over images of the squared deviation of their second moment from `second`


@dataclass(frozen=True)
class Running:
    """What an evaluation normalises with, and how it came about."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,), *unbiased within-batch*
    weight: Tensor  # (C,), affine; ones without
    eps: float
    images: int
    """In a training batch."""
    noise: float
    """The variance of an average of independent batches, as a share of that of one: ``p / (2 - p)`` for momentum p, 0
    for statistics that are frozen."""
    reads_mean: bool = True
    """Whether the mean is subtracted at all; where it is not, d1 and e1 are 0."""


@dataclass(frozen=True)
class Effect:
    """How far a layer's output is off, in its own standard deviations, root mean square over its channels."""

    size: float
    lower: float
    """What it is at least, two standard errors below."""
    images: int

    @property
    def beyond(self) -> bool:
        """Whether it is certainly beyond `LIMIT`."""
        return self.lower > LIMIT

    @property
    def noticed(self) -> bool:
        """Whether it is certainly `NOTICEABLE`."""
        return self.lower > NOTICEABLE

    @property
    def noticeable(self) -> bool:
        """Whether it is `NOTICEABLE`, perhaps by chance."""
        return self.size > NOTICEABLE


def batch_sums(input: Tensor) -> Tensor:
    """Return `mean`, `second`, `between` and `spread` of `BatchSums`, (4, C), in float32 on the input's device.

    Args:
        input: (N, C, *spatial).
    """
    data = input.detach().float()
    if data.dim() > 2:
        # One reduction over the last dimensions of each image; all else is small.
        within, means = torch.var_mean(data.flatten(2), 2, correction=0)
    else:
        within, means = torch.zeros_like(data), data
    mean = means.mean(0)
    from_mean = means - mean
    second = within + from_mean.square()
    average = second.mean(0)
    return torch.stack((mean, average, from_mean.square().sum(0), (second - average).square().sum(0)))


def effect(batches: Sequence[BatchSums], running: Running) -> Effect | None:
    """Return how far statistics are from those of `batches`; None if these are too few images.

    With N images, pooled mean ``mu`` and *unbiased* variance ``v``, the variances A and Q of the images' means and
    second moments within batches, and running mean ``r`` and variance ``s2``, per channel::

        d1 = (mu - r)^2 / sqrt((s2 + eps) (v + eps))           e1 = A (1/N + noise/n) / sqrt((s2 + eps) (v + eps))
        d2 = log((v + eps) / (s2 + A (1/n - 1/N) + eps))^2 / 4   e2 = Q (1/N + noise/n) / (v + eps)^2 / 4

    d1 and d2 are squared distances, e1 and e2 what chance contributes to them. Their differences are averaged over the
    channels that vary, weighted by the square of the affine weight.
    """
    images = sum(batch.images for batch in batches)
    degrees = images - len(batches)
    if images < _LEAST_IMAGES or degrees < 1:
        return None
    pooled = Moments(torch.zeros(()), torch.zeros(()), torch.zeros(()))
    for batch in batches:
        count = torch.tensor(float(batch.images * batch.values), dtype=torch.float64)
        pooled = pooled.merge(Moments(count, batch.mean.double(), batch.second.double() * count))
    mu, v, eps = pooled.mean, pooled.variance(unbiased=True), running.eps
    a = torch.stack([batch.between.double() for batch in batches]).sum(0) / degrees
    q = torch.stack([batch.spread.double() for batch in batches]).sum(0) / degrees
    r, s2 = running.mean.double(), running.var.double().clamp(min=0)
    weight = running.weight.double().square().where(torch.maximum(s2, v) > _DEAD * eps, 0.0)
    if not weight.sum() > 0:
        return Effect(0.0, 0.0, images)
    weight = weight / weight.sum()

    chance = 1 / images + running.noise / running.images
    between = ((s2 + eps) * (v + eps)).sqrt()  # of the two variances, so that neither is taken for the right one
    d1 = (mu - r).square() / between * running.reads_mean
    e1 = a * chance / between * running.reads_mean
    # A batch's own variance lacks the part of the variance between images that its mean takes away.
    expected = (s2 + a * (1 / running.images - 1 / images)).clamp(min=0)
    d2 = ((v + eps) / (expected + eps)).log().square() / 4
    e2 = q * chance / (v + eps).square() / 4
    squared = (weight * (d1 - e1 + d2 - e2)).sum().item()
    error = (weight * ((4 * d1 * e1 + 2 * e1.square()).sqrt() + (4 * d2 * e2 + 2 * e2.square()).sqrt())).sum().item()
    return Effect(_root(squared), _root(squared - 2 * error), images)


def _root(squared: float) -> float:
    return math.sqrt(max(squared, 0.0)) if not math.isnan(squared) else 0.0


class EvaluatedLayers:
    """Hooks on the layers for the length of some batches; `close` removes them. Nothing waits for the device.

    Args:
        layers: the model's batch-norm layers.
        boundary: stands around every hook.
    """

    def __init__(self, layers: Sequence[BatchNormLayer], boundary: ErrorBoundary = UNBOUNDED) -> None:
        self._layers = layers
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
