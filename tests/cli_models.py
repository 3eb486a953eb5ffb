"""What the configs of the command's tests name."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from small_data import training_data
from small_models import Small
from torch.utils.data import DataLoader

from lightning_bn import Averaging, BatchNorm1d, StatisticsSets


class Data(pl.LightningDataModule):
    """The tests' training data, shuffled, and the same for validation."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(training_data(), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(training_data(), 16)


class LastOfOne(Data):
    """Validation data whose last batch has one sample."""

    def val_dataloader(self) -> DataLoader:
        return DataLoader(training_data(), 47)


class Averaged(Small):
    """A model that takes its average as an argument, and its optimizer from the config."""

    def __init__(self, averaging: Averaging, lr: float = 0.3) -> None:
        super().__init__(lr)
        self.bn1 = BatchNorm1d(5, averaging=averaging)


class InSets(Averaged):
    """A model with two sets of statistics."""

    def __init__(self, averaging: Averaging, lr: float = 0.3) -> None:
        super().__init__(averaging, lr)
        self.sets = StatisticsSets(self, ["day", "night"])


class OwnCLI(LightningCLI):
    """A program whose config has a key of its own."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--batch", type=int, default=8)
        parser.link_arguments("batch", "data.init_args.batch_size")


class Renaming(Averaged):
    """A model that loads checkpoints of an older form."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key.replace("old", "bn1"): value for key, value in state.items()}
