"""The digits of the benchmarks that hold images out: 1,397 to train on, 400 to judge by, 1x8x8 with values up to 2."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset


def _split() -> tuple[TensorDataset, TensorDataset]:
    found = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(found.images, dtype=torch.float32)[:, None] / 8)[order]
    labels = torch.tensor(found.target)[order]
    return TensorDataset(images[:1397], labels[:1397]), TensorDataset(images[1397:], labels[1397:])


TRAIN, HELD_OUT = _split()
