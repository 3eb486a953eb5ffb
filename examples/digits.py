"""What the examples share: scikit-learn's handwritten digits, a small CNN with batch norm, and the LightningModule
around it."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def digits(
    batch_size: int = 32, *, seed: int = 0
) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Return a shuffled training loader (1397 images of 1x8x8 in [0, 1]) and a validation loader (400), split by
    `seed`."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    training, validation = (TensorDataset(images[part], labels[part]) for part in (order[400:], order[:400]))
    # drop_last: batch norm can't train on a last batch of one image behind a global pooling.
    return (
        DataLoader(training, batch_size, shuffle=True, drop_last=True, generator=generator),
        DataLoader(validation, 200),
    )


def images_and_labels(loader: DataLoader[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return all images and all labels of a loader of `digits`."""
    if not isinstance(loader.dataset, TensorDataset):
        raise TypeError(f"images_and_labels({loader!r}): give one of the loaders of digits().")
    return loader.dataset.tensors


class ConvNet(nn.Sequential):
    """Four 3x3 convolutions, each with batch norm and ReLU, a global average pooling and a linear head."""

    def __init__(self, width: int = 16) -> None:
        def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

        blocks = [block(1, width), block(width, width, 2), block(width, 2 * width), block(2 * width, 2 * width, 2)]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


class Classifier(pl.LightningModule):
    """Cross entropy and accuracy of `model` on images with labels, trained by plain SGD."""

    def __init__(self, model: nn.Module, *, lr: float = 0.1) -> None:
        super().__init__()
        self.model = model
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_acc", (logits.argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def quiet_trainer(epochs: int, callbacks: Sequence[pl.Callback] = (), **options: Any) -> pl.Trainer:
    """Return a Trainer that says nothing: for examples that train many small models and print one table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # Lightning's advice on speed, of no use for a thousand tiny images, and its own use of torch's old names.
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*no `val_dataloader`|.*LeafSpec")
    torch.set_num_threads(1)  # more only wait for each other over images of 8x8
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{"accelerator": "cpu", **silent, **options})


def fit(
    module: pl.LightningModule,
    training: DataLoader[tuple[Tensor, ...]] | None = None,
    validation: DataLoader[tuple[Tensor, ...]] | None = None,
    *,
    epochs: int,
    callbacks: Sequence[pl.Callback] = (),
    **options: Any,
) -> None:
    """Train without a word, by a `quiet_trainer`."""
    trainer = quiet_trainer(epochs, callbacks, **options)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(module, training, validation)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> float:
    """Return the percentage of `images` that `model` gets right in eval mode."""
    return (model.eval()(images, **options).argmax(1) == labels).float().mean().item() * 100


def arguments(description: str | None, *, epochs: int) -> argparse.Namespace:
    """Return what the command line says: ``--seeds`` and ``--epochs``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=5, help="models trained, each from a seed of its own")
    parser.add_argument("--epochs", type=int, default=epochs)
    return parser.parse_args()
