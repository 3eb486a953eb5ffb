"""Detection and segmentation."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bn import recalibrate
from programs.base import Block, Module, average, program


class Dense(nn.Module):
    """An image to a map of two classes, from two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        )
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.backbone[0](images)
        coarse = F.interpolate(self.backbone[1](fine), size=6)
        return self.head(torch.cat((fine, coarse), 1))


class Segmentation(Module):
    """Every pixel brighter than 0 is of class 1."""

    def __init__(self) -> None:
        super().__init__(Dense())
        recalibrate(self.model, [torch.randn(64, 1, 6, 6)], layers="all", progress=False)  # as pretrained

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), (batch[0][:, 0] > 0).long())


@program()
class FullyConvolutional(Segmentation):
    """A network for segmentation, trained whole."""


@program()
class NormsInEval(Segmentation):
    """Batch norms in eval mode with an affine part that learns, put there when the fit starts, as mmdetection's
    norm_eval."""

    def on_train_epoch_start(self) -> None:
        for part in self.model.backbone.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()


@program()
class NormsInEvalByTrain(Segmentation):
    """The same by an overridden ``train``, as mmdetection has it."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for part in self.model.backbone.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        return self


@program()
class FrozenNorms(Segmentation):
    """Batch norms frozen and in eval mode, convolutions learn, as torchvision's FrozenBatchNorm2d."""

    def __init__(self) -> None:
        super().__init__()
        for part in self.model.backbone.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.requires_grad_(False).eval()


@program()
class FrozenStem(Segmentation):
    """The first stage frozen and in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.model.backbone[0].requires_grad_(False).eval()


@program()
class YOLO(Segmentation):
    """An averaged copy with its buffers as a plain attribute, not a submodule; validation runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.ema = [copy.deepcopy(self.model).eval()]

    def on_before_zero_grad(self, optimizer: Any) -> None:
        average(self.ema[0], self.model, buffers=True)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.ema[0](batch[0])


@program()
class AveragedSubmodule(Segmentation):
    """The same as a submodule whose parameters still require grad and are in the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.ema = copy.deepcopy(self.model).eval()

    def on_before_zero_grad(self, optimizer: Any) -> None:
        average(self.ema, self.model, buffers=True)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.ema(batch[0])


@program()
class AuxiliaryHead(Segmentation):
    """DeepLab: a second head in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        target = (batch[0][:, 0] > 0).long()
        fine = self.model.backbone[0](batch[0])
        coarse = F.interpolate(self.model.backbone[1](fine), size=6)
        main = self.model.head(torch.cat((fine, coarse), 1))
        return F.cross_entropy(main, target) + 0.4 * F.cross_entropy(self.aux(fine), target)


@program()
class NormForEachLevel(Segmentation):
    """EfficientDet: convolutions shared by the levels, a batch norm for each."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(4, 4, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def loss(self, batch: list[Tensor]) -> Tensor:
        fine = self.model.backbone[0](batch[0])
        levels = fine, self.model.backbone[1](fine)
        outputs = [
            F.interpolate(norm(self.shared(level)), size=6) for norm, level in zip(self.norms, levels, strict=True)
        ]
        return F.cross_entropy(self.model.head(torch.cat(outputs, 1)), (batch[0][:, 0] > 0).long())


@program()
class UNet(Segmentation):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU())

    def loss(self, batch: list[Tensor]) -> Tensor:
        fine = self.model.backbone[0](batch[0])
        output = self.model.head(torch.cat((fine, self.up(self.model.backbone[1](fine))), 1))
        return F.cross_entropy(output, (batch[0][:, 0] > 0).long())


@program()
class LargestOfRegions(Segmentation):
    """Two stages: crops of the features of the first go into a head of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.regions = nn.Sequential(Block(4, 4), nn.Flatten(), nn.Linear(4, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        features = self.model.backbone[0](batch[0])
        crops = torch.cat([features[:, :, row : row + 3, row : row + 3] for row in range(3)])
        return F.cross_entropy(self.regions(crops), batch[1].repeat(3)) + self.loss(batch)


@program()
class SlowBackbone(Segmentation):
    """Two groups of learning rates."""

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.model.backbone.parameters(), "lr": 1e-3},
            {"params": self.model.head.parameters(), "lr": 1e-2},
        ]
        return torch.optim.SGD(groups, momentum=0.9)


@program()
class Pyramid(Segmentation):
    """DeepLab: dilated convolutions next to each other, and the mean of the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 2, 3, padding=rate, dilation=rate, bias=False), nn.BatchNorm2d(2), nn.ReLU())
            for rate in (1, 2)
        )
        self.whole = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        )

    def loss(self, batch: list[Tensor]) -> Tensor:
        fine = self.model.backbone[0](batch[0])
        parts = [branch(fine) for branch in self.branches]
        output = self.model.head(torch.cat((*parts, self.whole(fine).expand(-1, -1, 6, 6)), 1))
        return F.cross_entropy(output, (batch[0][:, 0] > 0).long())


@program()
class UnbiasedTeacher(Segmentation):
    """Half of the images are labelled by a teacher of averaged weights and buffers, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        labelled, unlabelled = batch[0].chunk(2)
        with torch.no_grad():
            targets = self.teacher(unlabelled).argmax(1)
        outputs = self(torch.cat((labelled, unlabelled + 0.1 * torch.randn_like(unlabelled))))
        return F.cross_entropy(outputs, torch.cat(((labelled[:, 0] > 0).long(), targets)))

    def on_train_batch_end(self, *args: Any) -> None:
        average(self.teacher, self.model, buffers=True)
