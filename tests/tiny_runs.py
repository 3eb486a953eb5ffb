"""The smallest real Trainer runs in which a rule can be broken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import Finding, ModeCheck

BATCHES = 6


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


class Module(pl.LightningModule):
    """Trains `model`; the mistakes are made in subclasses."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = Net() if model is None else model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.loss(batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.loss(batch)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


def data(batch_size: int = 16, batches: int = BATCHES) -> DataLoader[Any]:
    """Return a loader of standard normal images of 1x6x6 with labels of two classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size * batches, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(images, (images.mean((1, 2, 3)) > 0).long()), batch_size)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Return a silent Trainer of one epoch."""
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(**{**silent, "accelerator": "cpu", "max_epochs": 1, "callbacks": list(callbacks), **options})


def findings(
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    loader: DataLoader[Any] | None = None,
    check: ModeCheck | None = None,
    **options: Any,
) -> list[Finding]:
    """Fit `module` with a validation after each epoch, and return what `ModeCheck` found."""
    check = check or ModeCheck(action="log")
    with quiet():
        trainer(*callbacks, check, **options).fit(module, loader or data(), data(batches=2))
    return check.findings


def serious(found: list[Finding]) -> list[str]:
    """Return the codes of the findings above information."""
    return [finding.code for finding in found if finding.level != "info"]


def of(code: str, found: list[Finding]) -> list[Finding]:
    """Return the findings of one rule."""
    return [finding for finding in found if finding.code == code]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning says of tiny runs: few workers, eval modes, intervals; a wrong program's warnings are its
    own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        yield
