"""Supervised recipes: augmentation, losses, optimizers, averages of weights, shapes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bn import BatchNormRecalibration, Window, convert_batch_norm, paused_statistics
from programs.base import Block, Module, backbone, program


@program()
class Plain(Module):
    """Nothing special."""


@program()
class Mixup(Module):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        share = float(torch.rand(()))
        logits = self(share * batch[0] + (1 - share) * batch[0].flip(0))
        return share * F.cross_entropy(logits, batch[1]) + (1 - share) * F.cross_entropy(logits, batch[1].flip(0))


@program(accumulate_grad_batches=2)
class Accumulates(Module):
    """Gradients of two batches."""


@program(gradient_clip_val=0.5)
class Clips(Module):
    """Clipped gradients."""


@program(precision="bf16-mixed")
class MixedPrecision(Module):
    """Autocast."""


@program(lambda: EMAWeightAveraging(decay=0.9))
class EMA(Module):
    """Lightning's averaged weights and buffers."""


@program(lambda: WeightAveraging(use_buffers=False), lambda: BatchNormRecalibration(when="validation"))
class AveragedAndRecalibrated(Module):
    """Averaged weights, with statistics of their own."""


@program(lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), max_epochs=3)
class SWA(Module):
    """Lightning's stochastic weight averaging."""


@program()
class LBFGS(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


@program()
class SAM(Module):
    """Sharpness-aware minimisation, the second forward of which does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        steps = [0.05 * parameter.grad for parameter in self.parameters()]
        self.move(steps, 1)
        optimizer.zero_grad()
        with paused_statistics(self.model):
            self.manual_backward(self.loss(batch))
        self.move(steps, -1)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def move(self, steps: list[Tensor], sign: int) -> None:
        for parameter, step in zip(self.parameters(), steps, strict=True):
            parameter.add_(step, alpha=sign)


@program()
class Triplets(Module):
    """Three forwards of one network."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        anchor, positive, negative = self(batch[0]), self(batch[0] + 0.1), self(batch[0].flip(0))
        return F.triplet_margin_loss(anchor, positive, negative)


@program()
class ArcFace(Module):
    """Class weights on a sphere."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(backbone(), nn.BatchNorm1d(16)))
        self.classes = nn.Parameter(torch.randn(2, 16))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(8 * F.normalize(self(batch[0]), dim=1) @ F.normalize(self.classes, dim=1).T, batch[1])


@program()
class StochasticDepth(Module):
    """A residual block that is left out now and then."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(Block(1, 4), nn.Flatten(), nn.Linear(64, 2)))
        self.residual = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))

    def forward(self, images: Tensor) -> Tensor:
        features = self.model[0](images)
        if not self.training or torch.rand(()) < 0.7:
            features = (features + self.residual(features)).relu()
        return self.model[2](features.flatten(1))


@program()
class MultiTask(Module):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        features = self.model.backbone(batch[0])
        brightness = batch[0].mean((1, 2, 3))
        return F.cross_entropy(self.model.head(features), batch[1]) + F.mse_loss(
            self.second(features).flatten(), brightness
        )


@program(max_epochs=3)
class HeadFromTheSecondEpochOn(MultiTask):
    """Progressive: a part that training runs later, and validation from the start."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch) if self.current_epoch == 0 else super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.second(self.model.backbone(batch[0]))


@program()
class Sequences(Module):
    """One-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(
                nn.Flatten(2), nn.Conv1d(1, 4, 5, bias=False), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(128, 2)
            )
        )


@program()
class Volumes(Module):
    """Three-dimensional convolutions."""

    def __init__(self) -> None:
        layers = (
            nn.Unflatten(1, (1, 1)),
            nn.Conv3d(1, 4, (1, 3, 3), bias=False),
            nn.BatchNorm3d(4),
            nn.Flatten(),
            nn.Linear(64, 2),
        )
        super().__init__(nn.Sequential(*layers))


@program()
class Checkpointed(Module):
    """Activation checkpointing with the layers of this package."""

    def __init__(self) -> None:
        super().__init__()
        convert_batch_norm(self.model, Window(3))

    def forward(self, images: Tensor) -> Tensor:
        return self.model.head(checkpoint(self.model.backbone, images, use_reentrant=False))


@program()
class MetricOfTheBatch(Module):
    """A metric of the training batch in eval mode, put back."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.eval()
        with torch.no_grad():
            self.loss(batch)
        self.train()
        return loss


@program()
class CutMix(Module):
    """A rectangle of each image is another's."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        height, width = (int(torch.randint(1, 6, ())) for _ in range(2))
        top, left = (int(torch.randint(7 - side, ())) for side in (height, width))
        mixed = images.clone()
        mixed[:, :, top : top + height, left : left + width] = images.flip(0)[
            :, :, top : top + height, left : left + width
        ]
        share = height * width / 36
        logits = self(mixed)
        return (1 - share) * F.cross_entropy(logits, labels) + share * F.cross_entropy(logits, labels.flip(0))


@program()
class CompiledPart(Module):
    """`torch.compile` of the backbone alone."""

    def __init__(self) -> None:
        super().__init__()
        self.model.backbone = torch.compile(self.model.backbone, backend="aot_eager")


@program()
class RDrop(Module):
    """Two forwards of one batch, that differ in their dropout."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        one, other = self(batch[0]), self(batch[0])
        agreement = F.kl_div(one.log_softmax(1), other.softmax(1), reduction="batchmean")
        return F.cross_entropy(one, batch[1]) + F.cross_entropy(other, batch[1]) + agreement


@program()
class AdvProp(Module):
    """Adversarial images go through batch norms of their own, which an evaluation does not use."""

    def __init__(self) -> None:
        super().__init__(nn.Module())
        self.convolution = nn.Conv2d(1, 4, 3, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))

    def forward(self, images: Tensor, norm: int = 0) -> Tensor:
        return self.head(self.norms[norm](self.convolution(images)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images = batch[0].clone().requires_grad_()
        loss = F.cross_entropy(self(images, 1), batch[1])
        (direction,) = torch.autograd.grad(loss, images)
        attacked = (images + 0.1 * direction.sign()).detach()
        return self.loss(batch) + F.cross_entropy(self(attacked, 1), batch[1])


@program()
class ProgressiveResizing(Module):
    """Images that are larger in the second epoch."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(Block(1, 4), Block(4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images = F.interpolate(batch[0], size=6 + 4 * self.current_epoch)
        return F.cross_entropy(self(images), batch[1])
