"""A LightningCLI: ``python main.py fit --config config.yaml``. It knows nothing of lightning_bn; the config does."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))  # digits.py, which all examples share
from digits import Classifier, ConvNet, digits


class DigitsClassifier(Classifier):
    """A small CNN with four batch norms."""

    def __init__(self, width: int = 16, lr: float = 0.3) -> None:
        super().__init__(ConvNet(width), lr=lr)


class Digits(pl.LightningDataModule):
    """1797 handwritten digits of 8x8 pixels, from scikit-learn."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.train, self.val = digits(batch_size)

    def train_dataloader(self) -> DataLoader:
        return self.train

    def val_dataloader(self) -> DataLoader:
        return self.val


if __name__ == "__main__":
    LightningCLI(DigitsClassifier, Digits)
