"""What the configs of the command's tests name."""

from __future__ import annotations

import lightning.pytorch as pl
from fits import Small, training_data
from torch.utils.data import DataLoader

from lightning_bn import Averaging, BatchNorm1d


class Data(pl.LightningDataModule):
    """The tests' training data, shuffled, and the same for validation."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(training_data(), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(training_data(), 16)


class Averaged(Small):
    """A model that takes its average as an argument, and its optimizer from the config."""

    def __init__(self, averaging: Averaging, lr: float = 0.3) -> None:
        super().__init__(lr)
        self.bn1 = BatchNorm1d(5, averaging=averaging)
