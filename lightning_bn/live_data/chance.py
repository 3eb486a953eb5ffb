"""What is to be expected of n images by chance, at several layers together, and how far n live ones are from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.buffers import running_statistics
from lightning_bn.recalibration.image_moments import ImageMoments
from lightning_bn.recalibration.spread import DRAWS, Spread, logarithm, sizes_from

# A layer whose input is constant deviates by as much in all draws.
_LEAST_STD = 1e-3


class Judgement(NamedTuple):
    """How far n images are from others, on the host."""

    z: float
    """The largest of the layers."""
    limit: float
    """What z exceeds in no more draws than the alarm allows for."""
    reached: int
    """The number of draws whose largest z is as large."""
    layers: tuple[tuple[float, int], ...]
    """The z of each layer, and the number of draws that reach it there."""


class Chance:
    """The draws of some layers of a model, whose channels lie side by side: what is done for each image costs a layer
    nothing of its own.

    Args:
        layers: that were measured in one pass.
        spreads: theirs.
        alarm: the rate of false alarms.
    """

    def __init__(self, layers: Sequence[_BatchNorm], spreads: Sequence[Spread], alarm: float) -> None:
        self._layers = layers
        self._spreads = spreads
        self._images, self._all_images = spreads[0].images, spreads[0].all_images
        self._rank = int(alarm * (DRAWS + 1) + 1e-9)
        self._home = spreads[0].draws.device
        self._reference = self._beside([spread.reference for spread in spreads])
        self._center = self._beside([spread.center for spread in spreads])
        self._scale = self._beside([spread.scale for spread in spreads])
        sizes = torch.tensor([spread.center.shape[1] for spread in spreads])
        eps = torch.tensor([layer.eps for layer in layers])
        self._eps = eps.repeat_interleave(sizes).to(self._home)
        self._owner = torch.arange(len(layers)).repeat_interleave(sizes).to(self._home)
        self._sizes = sizes.to(self._home)
        self._drawn: dict[int, _Drawn] = {}

    def judged(self, images: Sequence[ImageMoments]) -> Judgement | None:
        """Return how far the images, whose moments at each layer these are, are from others; None if the running
        statistics are not those of the spread. The host waits for the device once."""
        mean, var = (torch.cat([each[part].to(self._home) for each in images], 1) for part in range(2))
        count = len(mean)
        drawn = self._drawn_for(count)
        live = self._deviations(ImageMoments(mean, var), count)
        z = (live - drawn.mean) / drawn.std
        worst = z.amax()
        # Both are sorted, so what is not below a value stands behind its place.
        more = DRAWS - torch.searchsorted(drawn.worst, worst[None])
        each = DRAWS - torch.searchsorted(drawn.layers, live[:, None])[:, 0]
        limit = drawn.worst[-self._rank]
        moved, worst, limit, more, *rest = torch.cat((self._moved(), worst[None], limit[None], more, z, each)).tolist()
        layers = zip(rest[: len(z)], map(int, rest[len(z) :]), strict=True)
        return None if moved else Judgement(worst, limit, int(more), tuple(layers))

    def _deviations(self, images: ImageMoments, count: int) -> Tensor:
        """Return that of each layer, (layers,); infinite where an image is not finite."""
        expected = 1 / count + 1 / self._all_images
        means = images.standardised(self._reference[0], self._reference[1], self._eps).mean(0)
        squares = ((means - self._center) / self._scale).square().mean(0)
        sums = torch.zeros(len(self._layers), dtype=squares.dtype, device=self._home)
        sums.index_add_(0, self._owner, squares)
        return torch.nan_to_num(logarithm(sums / self._sizes / expected), nan=math.inf)

    def _moved(self) -> Tensor:
        """Return whether some layer has other running statistics than its spread, (1,)."""
        now = zip(*map(running_statistics, self._layers), strict=True)
        pairs = zip(self._reference, (torch.cat([each.to(self._home) for each in part]) for part in now), strict=True)
        return torch.stack([(old.to(new.dtype) != new).any() for old, new in pairs]).any()[None].to(self._reference)

    def moved(self) -> list[_BatchNorm]:
        """Return the layers whose running statistics are not those of their spreads."""
        now = [torch.stack(running_statistics(layer)) for layer in self._layers]
        pairs = zip(self._layers, self._spreads, now, strict=True)
        return [layer for layer, spread, new in pairs if not torch.equal(spread.reference.to(new), new)]

    def _beside(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.to(self._home) for tensor in tensors], 1)

    def _drawn_for(self, images: int) -> _Drawn:
        size = max(size for size in sizes_from(self._images) if size <= images)
        if size not in self._drawn:
            drawn = torch.stack([spread.drawn(size).to(self._home) for spread in self._spreads])
            std, mean = torch.std_mean(drawn, 1)
            std = std.clamp(min=_LEAST_STD)
            worst = ((drawn - mean[:, None]) / std[:, None]).amax(0)
            self._drawn[size] = _Drawn(drawn.sort(1).values, mean, std, worst.sort().values)
        return self._drawn[size]


class _Drawn(NamedTuple):
    """By chance."""

    layers: Tensor  # (layers, DRAWS), deviations, sorted for each layer
    mean: Tensor  # (layers,)
    std: Tensor  # (layers,)
    worst: Tensor  # (DRAWS,), the largest z of each draw, sorted
