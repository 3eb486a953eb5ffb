"""What keeps a pretrained backbone's batch norms as they are: one epoch of fine-tuning on digits, with a validation.

    python benchmarks/freezing.py

"moved" is how far the running means are from the pretrained ones afterwards, in pretrained standard deviations (root
of the mean square over channels, worst layer); "answers alone" is whether a training forward of one image gives what it
gives among others, which tells whether the layers normalise with the batch.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import FreezeBatchNorm, ModeCheck


class Net(pl.LightningModule):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(32, 10)
        self.alone: list[bool] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 5:
            frozen = copy.deepcopy(self.backbone).requires_grad_(False)
            self.alone.append(torch.allclose(frozen(batch[0])[:1], frozen(batch[0][:2])[:1], atol=1e-4))
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.head(self.backbone(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([each for each in self.parameters() if each.requires_grad], lr=0.1)


class Override(Net):
    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        self.backbone.eval()
        return self


class Hook(Net):
    def on_train_epoch_start(self) -> None:
        self.backbone.eval()


class WithoutStatistics(pl.callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module: Net) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: Net, epoch: int, optimizer: Any) -> None:
        """Nothing thaws."""


def backbone(inputs: Tensor) -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()]
    net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        for _ in range(60):
            net(inputs[torch.randint(len(inputs), (64,))])
    return net


def fit(make: Callable[[nn.Module], Net], callbacks: list[pl.Callback]) -> tuple[float, bool]:
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    pretrained = backbone(inputs)
    before = copy.deepcopy(pretrained)
    module = make(pretrained.requires_grad_(False))
    data = TensorDataset(1 - inputs, targets)  # another domain: inverted
    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    runner = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, **options)
    runner.fit(module, DataLoader(data, 32, shuffle=True), DataLoader(data, 64))
    pairs = zip(module.backbone.modules(), before.modules(), strict=True)
    moved = [
        ((one.running_mean - other.running_mean) / (other.running_var + other.eps).sqrt()).square().mean().sqrt().item()
        for one, other in pairs
        if isinstance(other, nn.BatchNorm2d)
    ]
    return max(moved), all(module.alone)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    ways: dict[str, tuple[Callable[[nn.Module], Net], list[pl.Callback]]] = {
        "`requires_grad_(False)` alone": (Net, []),
        '`ModeCheck(fix=["BN201"])`': (Net, [ModeCheck(fix=["BN201"], action="log")]),
        "`BaseFinetuning.freeze(train_bn=False)`": (Net, [WithoutStatistics()]),
        "`train()` overridden, `backbone.eval()` in it": (Override, []),
        "`backbone.eval()` in `on_train_epoch_start`": (Hook, []),
        '`FreezeBatchNorm("backbone")`': (Net, [FreezeBatchNorm("backbone")]),
    }
    print("| | moved | answers alone |\n|---|---:|---|")
    for name, (make, callbacks) in ways.items():
        moved, alone = fit(make, callbacks)
        print(f"| {name} | {moved:.3f} | {'yes' if alone else 'no'} |")


if __name__ == "__main__":
    main()
