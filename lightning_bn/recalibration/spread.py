"""How much one image's moments at a layer differ from another's, and what follows for the moments of n images by
chance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging.base import TrainingState
from lightning_bn.buffers import running_statistics
from lightning_bn.discovery import find_batch_norms

SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of images for which chance is drawn; beyond them the means of images are normally distributed."""
DRAWS = 2000
"""Draws of each size, and the most images that they are drawn from."""

# In units of the layer's own standard deviation: what a channel differs by less is of no account, be it rounding or a
# channel that is constant.
_LEAST_SCALE = 0.01
# A size is drawn where there are as many times as many images: fewer, and the draws are too much alike.
_TIMES = 4
LEAST_IMAGES = 8
"""Fewer tell of no spread."""
# Of the expected deviation; keeps the logarithm finite where a layer's input is constant.
_LEAST_DEVIATION = 1e-3
_NAME = "spread"


class Spread(TrainingState):
    """What a batch-norm layer keeps of a pass over images, to tell later by how much n other images differ by chance.

    An image has two moments a channel, of what the layer normalises: the mean and the mean square over its positions
    of ``(x - running_mean) / sqrt(running_var + eps)``. The *deviation* of n images is the logarithm of

        mean over channels and moments of ``(mean over images - center)**2 / (scale**2 * (1 / n + 1 / N))``,

    with the center of all N images of the pass, and the scale, the standard deviation from image to image. The
    logarithm's argument is 1 on average. Its distribution follows from no formula, since channels depend on each other
    and single images are not normally distributed. So it is drawn: n of up to `DRAWS` of the images, again and again,
    the same ones in all layers of a model, so that what depends on several layers can be drawn too.

    The tensors are private training state: saved with the model, absent from a plain checkpoint.

    Args:
        channels: of the layer.
    """

    # No forward of the layer has to do with it, so TorchScript leaves it out of what it compiles.
    __jit_ignored_attributes__ = ("reference", "center", "scale", "draws", "counts")
    __jit_unused_properties__ = (
        *("images", "all_images", "calls", "measured_in"),
        *("state_meaning", "state_of"),
    )

    reference: Tensor  # (2, C), the running mean and variance that it was measured with
    center: Tensor  # (2, C), the mean over images of both moments
    scale: Tensor  # (2, C), their standard deviation from image to image
    draws: Tensor  # (sizes, DRAWS), deviations, draw by draw of the same images in all layers
    counts: Tensor  # (4,) int64: images that are drawn from, 0 for none; all images; calls in a forward; which pass

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        super().__init__()
        state = {name: torch.zeros(2, channels, device=device) for name in ("reference", "center", "scale")}
        state["draws"] = torch.zeros(len(SIZES), DRAWS, device=device)
        state["counts"] = torch.zeros(4, dtype=torch.int64, device="cpu")
        self._declare(state)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.images:  # room that nothing has filled leaves no trace in a checkpoint
            super()._save_to_state_dict(destination, prefix, keep_vars)

    @property
    def images(self) -> int:
        """How many images are drawn from; 0: it was never measured, or a plain checkpoint was loaded."""
        return int(self.counts[0])

    @property
    def all_images(self) -> int:
        """How many images the center is of."""
        return int(self.counts[1])

    @property
    def calls(self) -> int:
        """How often the layer was called in a forward."""
        return int(self.counts[2])

    @property
    def measured_in(self) -> int:
        """In which pass it was measured: only in one pass the draws are of the same images."""
        return int(self.counts[3])

    def measure(
        self, layer: _BatchNorm, moments: Tensor, center: Tensor, *, all_images: int, calls: int, measured_in: int
    ) -> None:
        """Take in what a pass has seen. The draws are by a generator of its own, so equal moments give equal draws.

        Args:
            layer: whose spread it is.
            moments: of the images to draw from, (images, 2, C).
            center: the mean over all images, (2, C).
            all_images: their number.
            calls: of the layer, in one forward.
            measured_in: which pass it was.
        """
        self.reference.copy_(torch.stack(running_statistics(layer)))
        self.center.copy_(center)
        self.scale.copy_(moments.std(0).clamp(min=_LEAST_SCALE))
        generator = torch.Generator().manual_seed(0)
        centred = (moments - moments.mean(0)).flatten(1)
        self.draws.zero_()
        for row, size in enumerate(sizes_from(len(moments))):
            self.draws[row].copy_(_drawn(centred, size, generator))
        self.counts.copy_(torch.tensor([len(moments), all_images, calls, measured_in]))

    def drawn(self, size: int) -> Tensor:
        """Return the deviations of `size` images by chance, (DRAWS,); one of `sizes_from` the images that it has."""
        return self.draws[SIZES.index(size)]


def sizes_from(images: int) -> tuple[int, ...]:
    """Return the sizes that are drawn from as many images."""
    return tuple(size for size in SIZES if size == 1 or _TIMES * size <= images)


def spread_of(layer: nn.Module) -> Spread | None:
    """Return what a layer keeps, None if it keeps none."""
    found = layer._modules.get(_NAME)
    return found if isinstance(found, Spread) else None


def give_spread(layer: nn.Module, spread: Spread | None) -> None:
    """Let a layer keep `spread`, or none."""
    if spread is not None:
        layer.add_module(_NAME, spread)
    elif spread_of(layer) is not None:
        delattr(layer, _NAME)


def has_no_room(layer: nn.Module) -> bool:
    """Whether an attribute of the layer's own has the name already."""
    return hasattr(layer, _NAME) and spread_of(layer) is None


def keep_spread(model: nn.Module) -> nn.Module:
    """Make room in the batch-norm layers of `model` for a spread that a checkpoint holds.

    Call it on a newly built model before ``load_state_dict``, so that it takes in what ``recalibrate(...,
    spread=True)`` has measured. A checkpoint without a spread loads too, under ``strict=True``, and leaves the room
    empty. `to_torch` removes it.

    Args:
        model: any module; layers of torch, of this package and any other subclass of ``_BatchNorm``, which keep what
            they have.

    Returns:
        `model` itself.

    Example:
        >>> import torch
        >>> from lightning_bn import drift, keep_spread, recalibrate
        >>> trained = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> report = recalibrate(trained, [torch.randn(500, 1)], spread=True, progress=False)
        >>> served = keep_spread(torch.nn.Sequential(torch.nn.BatchNorm1d(1)))
        >>> served.load_state_dict(trained.state_dict())
        <All keys matched successfully>
        >>> drift(served, torch.randn(8, 1) + 9).is_alarm
        True
    """
    for layer in find_batch_norms(model):
        if layer.tracks and spread_of(layer.module) is None and not has_no_room(layer.module):
            mean, _ = running_statistics(layer.module)
            give_spread(layer.module, Spread(len(mean), mean.device))
    return model


def _drawn(moments: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return the deviations of `size` images in each draw, (DRAWS,).

    The images of a draw are judged by the center and the scale of all others: with their own in them, what is drawn
    would be nearer than what comes later, by the more the fewer images there are.

    Args:
        moments: of all images, (N, 2 C), centred.
        size: images in a draw.
        generator: on the CPU; equal ones draw the same images in every layer.
    """
    others = len(moments) - size
    drawn = _drawn_images(len(moments), size, generator).to(moments.device)
    sums = functional.embedding_bag(drawn, moments, mode="sum")
    # As all images are centred, those that were not drawn have the opposite sum.
    squares = moments.square()
    squares_of_others = squares.sum(0) - functional.embedding_bag(drawn, squares, mode="sum")
    var_of_others = (squares_of_others - sums.square() / others) / (others - 1)
    distance = sums / size + sums / others
    deviations = distance.square() / var_of_others.clamp(min=_LEAST_SCALE**2)
    return logarithm(deviations.mean(1) / (1 / size + 1 / others))


def _drawn_images(images: int, size: int, generator: torch.Generator) -> Tensor:
    """Return the images of each draw, (DRAWS, size), none twice in a draw, and each about as often as any other."""
    draws = images // size
    permutations = [torch.randperm(images, generator=generator) for _ in range(-(-DRAWS // draws))]
    return torch.cat([order[: draws * size].view(draws, size) for order in permutations])[:DRAWS]


def logarithm(deviation: Tensor) -> Tensor:
    """Return the deviation of its argument; monotonic, so it changes no comparison, and nearly normal."""
    return (deviation + _LEAST_DEVIATION).log()
