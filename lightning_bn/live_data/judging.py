"""The moments of live images against those of the images that a spread was measured on: what is to be expected of n
images by chance, at several layers together, and how far n live ones are from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.buffers import running_statistics
from lightning_bn.discovery import BatchNormLayer, find_batch_norms, listing
from lightning_bn.live_data.report import DriftReport, LayerDeviation
from lightning_bn.modes import eager, extra_pass, kept_attribute
from lightning_bn.recalibration.feeding import Forward, runner
from lightning_bn.recalibration.image_moments import ImageMoments, ImageReader
from lightning_bn.recalibration.spread import DRAWS, Spread, logarithm, sizes_from, spread_of
from lightning_bn.sharding import unwrapped


def drift(
    model: nn.Module,
    batch: Any,
    *,
    alarm: float = 0.01,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
) -> DriftReport:
    """Tell whether the images of `batch` are still like those on which the spread of `model` was measured.

    At each batch-norm layer the images have two moments a channel, mean and mean square over positions. Their average
    over the n images is compared with that of n images by chance, as ``recalibrate(model, batches, spread=True)`` has
    drawn them: the network's deviation is the largest of its layers', and so many are drawn of that too. On images like
    those, whatever n is, an alarm comes with the probability `alarm`. No labels and no training data are needed.

    It does not estimate accuracy: it also reports shifts that are harmless to the network. A batch of one class is a
    shift, and so is a video's next frames: batches have to be mixed as the data of the spread is. It sees changes of
    brightness, contrast, noise and sharpness in few images, and changes of shape, such as a rotation, in more.

    Args:
        model: with a spread of this data at inference; run in eval mode here, and every mode restored.
        batch: as one for `recalibrate`; its length is the number of images.
        alarm: probability of a false alarm, from ``1 / (N + 1)`` on with a spread of N images.
        forward: ``forward(model, batch)``, for any other call.
        device: where the batch is moved. None: where the model's first parameter is.

    Returns:
        A `DriftReport`: ``is_alarm``, ``first``, a z and a p-value for the network and each layer; prints as a table.

    Raises:
        ValueError: no layer has a spread; the running statistics have moved since it was measured; `alarm` is out of
            range; no layer with a spread ran.

    Example:
        >>> import torch
        >>> from lightning_bn import drift, recalibrate
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
        >>> clean = torch.rand(1000, 1, 8, 8)
        >>> report = recalibrate(model, clean.split(100), spread=True, progress=False)
        >>> drift(model, torch.rand(4, 1, 8, 8)).is_alarm, drift(model, torch.rand(4, 1, 8, 8) + 0.2).is_alarm
        (False, True)
    """
    core = unwrapped(model)
    judge = Judge(core, alarm, "drift(model, batch)")
    run = runner(core, forward, device, "drift(model, batch)")
    with ExitStack() as stack:
        stack.enter_context(extra_pass())
        stack.enter_context(kept_attribute(core.modules(), "training"))
        stack.enter_context(eager(core))
        stack.enter_context(torch.no_grad())
        images = stack.enter_context(judge.listening())
        core.eval()
        run(batch)
    return judge.report(images)


class Judge:
    """Compares the moments of images with the spread of a model's layers.

    Args:
        model: whose layers have one.
        alarm: the rate of false alarms.
        call: the user's, as an error is to show it.

    Raises:
        ValueError: no layer has a spread, or it was measured on too few images for `alarm`.
    """

    def __init__(self, model: nn.Module, alarm: float, call: str) -> None:
        self.alarm = alarm
        self._call = call
        tracking = [layer for layer in find_batch_norms(model) if layer.tracks]
        found = [(layer, spread) for layer in tracking if (spread := spread_of(layer.module)) and spread.images]
        if not found:
            raise ValueError(_no_spread(call, tracking))
        self._layers: dict[_BatchNorm, BatchNormLayer] = {layer.module: layer for layer, _ in found}
        self._spreads: dict[_BatchNorm, Spread] = {layer.module: spread for layer, spread in found}
        # Asked for once: they may be on the device.
        self._calls = {layer: spread.calls for layer, spread in self._spreads.items()}
        self._without = [f"{_named(layer)}: it has no spread" for layer in tracking if layer.module not in self._layers]
        if len({spread.measured_in for spread in self._spreads.values()}) > 1:
            raise ValueError(
                f"{call}: the spreads of the layers were measured in different passes, so the layers can't be judged "
                "together. Measure them in one: recalibrate(model, batches, spread=True), with layers='all' if some "
                "are frozen."
            )
        self._known: dict[tuple[_BatchNorm, ...], Chance] = {}
        self._images = next(iter(self._spreads.values())).images
        self._least = 1 / (min(self._images, DRAWS) + 1)
        if not self._least <= alarm < 1:
            raise ValueError(
                f"{call[:-1]}, alarm={alarm!r}): a probability below 1, and with a spread of {self._images} images at "
                f"least {self._least:.2g}: rarer things were not seen. For less measure the spread on more images, up "
                f"to {DRAWS}."
            )

    def listening(self) -> ImageReader:
        """Return a context in which forwards leave the moments that `report` judges."""
        return ImageReader(self._layers)

    def report(self, images: ImageReader) -> DriftReport:
        """Judge the images of the last forward. The host waits for the device once.

        Raises:
            ValueError: no layer with a spread ran, or running statistics have moved since it was measured.
        """
        found = {layer: images.at(layer, self._calls[layer]) for layer in images.ran if layer in self._calls}
        judged = {layer: moments for layer, moments in found.items() if not isinstance(moments, str)}
        not_judged = [
            f"{_named(layer)}: {found.get(layer.module, 'it did not run')}"
            for layer in self._layers.values()
            if layer.module not in judged
        ]
        if not judged:
            raise ValueError(f"{self._call}: no layer with a spread could be judged. {'; '.join(not_judged)}.")
        layers = tuple(judged)
        if layers not in self._known:
            self._known[layers] = Chance(layers, [self._spreads[layer] for layer in layers], self.alarm)
        found_out = self._known[layers].judged(list(judged.values()))
        if found_out is None:
            moved = [self._layers[layer].name or "the model" for layer in self._known[layers].moved()]
            raise ValueError(
                f"{self._call}: the running statistics of {listing(moved)} have moved since the spread was measured: "
                "drift is judged by recalibrated statistics alone. After the last training step call "
                "recalibrate(model, batches, spread=True) again."
            )
        return DriftReport(
            images=images.images,
            z=found_out.z,
            p=self._p(found_out.reached),
            alarm=self.alarm,
            limit=found_out.limit,
            spread_images=self._images,
            layers=tuple(
                LayerDeviation(
                    self._layers[layer].name, self._layers[layer].kind, z, self._p(reached), z > found_out.limit
                )
                for layer, (z, reached) in zip(layers, found_out.layers, strict=True)
            ),
            not_judged=(*not_judged, *self._without),
        )

    def _p(self, reached: int) -> float:
        """Return the p-value of what as many of the draws reach."""
        return max((reached + 1) / (DRAWS + 1), self._least)


def _no_spread(call: str, tracking: list[BatchNormLayer]) -> str:
    if not tracking:
        return f"{call}: the model has no batch-norm layer that keeps running statistics."
    room = any(spread_of(layer.module) is not None for layer in tracking)
    load = "" if room else " If its checkpoint holds one, call keep_spread(model) before load_state_dict."
    return (
        f"{call}: none of the {len(tracking)} batch-norm layers has a spread to compare with. Measure it on data like "
        f"those that will come: recalibrate(model, batches, spread=True).{load}"
    )


def _named(layer: BatchNormLayer) -> str:
    return layer.name or "(the model)"


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
