"""A model, data and a Trainer so small that a fit takes a fraction of a second, for the tests of callbacks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from oracles import Array, mean_and_unbiased_variance
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def training_data(size: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(size, 4, generator=generator) * torch.tensor([1.0, 2.0, 0.5, 3.0]) + torch.tensor(
        [5.0, 0.0, -3.0, 1.0]
    )
    return TensorDataset(inputs, (inputs[:, 1] > inputs[:, 3]).long())


def loader(batch_size: int = 8, **options: Any) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(training_data(), batch_size, **{"shuffle": True, **options})


class Steps:
    """Two batch-norm layers, dropout, and a validation that logs loss and accuracy; to be mixed into a
    LightningModule."""

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
        inputs, labels = batch
        loss = F.cross_entropy(self(inputs), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        logits = self(inputs)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_acc", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Small(Steps, pl.LightningModule):
    """`Steps` of ``lightning.pytorch``."""


# Where a run without a logger leaves its table.
_ROOT = tempfile.TemporaryDirectory()


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "default_root_dir": _ROOT.name,
        "enable_checkpointing": any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))


def fit(
    *callbacks: pl.Callback,
    module: pl.LightningModule | None = None,
    train: Any = None,
    val: Any = "default",
    ckpt_path: Any = None,
    **options: Any,
) -> tuple[pl.LightningModule, pl.Trainer]:
    """Fit a `Small` from seed 0 on `training_data` and return it with its Trainer."""
    torch.manual_seed(0)
    module = Small() if module is None else module
    torch.manual_seed(1)
    runner = trainer(*callbacks, **options)
    val = DataLoader(training_data(), 16) if isinstance(val, str) else val
    if val is None:
        module.validation_step = pl.LightningModule.validation_step.__get__(
            module
        )  # else Lightning warns of a missing loader
    runner.fit(module, loader() if train is None else train, val, ckpt_path=ckpt_path, weights_only=False)
    return module, runner


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def parameters_equal(one: pl.LightningModule, other: pl.LightningModule) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def first_layer_statistics(state: dict[str, Tensor], inputs: Tensor | None = None) -> tuple[Array, Array]:
    """What `bn1` would see of the whole training data with the weights in `state`: float64 loops over the rows."""
    rows = (training_data().tensors[0] if inputs is None else inputs).double().numpy()
    weight, bias = state["first.weight"].double().numpy(), state["first.bias"].double().numpy()
    outputs = [[sum(w * x for w, x in zip(line, row, strict=True)) for line in weight] + bias for row in rows]
    return mean_and_unbiased_variance(np.stack(outputs))


def matches_weights(state: dict[str, Tensor], inputs: Tensor | None = None) -> bool:
    """Whether the statistics of `bn1` in `state` are those of the training data under the weights in `state`."""
    expected = first_layer_statistics(state, inputs)
    actual = (state[f"bn1.running_{name}"].double().numpy() for name in ("mean", "var"))
    return all(np.allclose(a, e, rtol=1e-4, atol=1e-5) for a, e in zip(actual, expected, strict=True))


def same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class SaveAtStep7(pl.Callback):
    """Save a checkpoint in the middle of an epoch and of a window."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == 7:
            trainer.save_checkpoint(self.path)
