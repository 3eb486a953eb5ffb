"""The smallest models that do what users' models do: `Small` for rows of four numbers, `Module` for images."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Steps:
    """What every stage of a classifier does with a batch; to be mixed into a LightningModule."""

    lr, momentum = 0.01, 0.0

    def loss(self, batch: Any) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self(inputs), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=self.lr, momentum=self.momentum)


class SmallSteps(Steps):
    """Two batch-norm layers, dropout, and steps that log losses and accuracy; to be mixed into a LightningModule."""

    momentum = 0.9

    def __init__(self, lr: float = 0.3) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.bn1 = nn.BatchNorm1d(5)
        self.rest = nn.Sequential(
            nn.ReLU(), nn.Dropout(0.2), nn.Linear(5, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)
        )
        self.lr = lr

    def forward(self, inputs: Tensor) -> Tensor:
        return self.rest(self.bn1(self.first(inputs)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        logits = self(inputs)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_acc", (logits.argmax(1) == labels).float().mean())


class Small(SmallSteps, pl.LightningModule):
    """`SmallSteps` of ``lightning.pytorch``."""


class Block(nn.Sequential):
    """A convolution without a bias, a batch norm, a ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    """A backbone of two blocks and a head with a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(Block(1, 4), Block(4, 4))
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 2)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class Module(Steps, pl.LightningModule):
    """Trains `model`; the mistakes are made in subclasses."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = Net() if model is None else model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)
