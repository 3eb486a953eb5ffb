"""The data of the small models: rows of four numbers, and images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

BATCHES = 6


def training_data(size: int = 48) -> TensorDataset:
    """Return rows of four numbers, of other means and spreads in each column, with labels of two classes."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(size, 4, generator=generator) * torch.tensor([1.0, 2.0, 0.5, 3.0]) + torch.tensor(
        [5.0, 0.0, -3.0, 1.0]
    )
    return TensorDataset(inputs, (inputs[:, 1] > inputs[:, 3]).long())


def loader(batch_size: int = 8, **options: Any) -> DataLoader[tuple[Tensor, ...]]:
    """Return a loader of `training_data`, shuffled."""
    return DataLoader(training_data(), batch_size, **{"shuffle": True, **options})


def data(batch_size: int = 16, batches: int = BATCHES) -> DataLoader[Any]:
    """Return a loader of standard normal images of 1x6x6 with labels of two classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size * batches, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(images, (images.mean((1, 2, 3)) > 0).long()), batch_size)


ROWS = torch.arange(160.0).view(40, 4) / 100


class WithPosition(IterableDataset[Tensor]):
    """Goes on where it stopped."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.place < len(ROWS):
            self.place += 1
            yield ROWS[self.place - 1]
        self.place = 0
