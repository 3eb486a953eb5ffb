"""Damaged files: what a disk, a network or an enemy does to the bytes of a checkpoint."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

__all__ = ["FORMATS", "mutated"]


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3), nn.BatchNorm1d(4))
    for _ in range(3):
        net(torch.randn(8, 3, 9) * 2 + 1)
    return net


def _saved(content: object, **how: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def _npz(state: dict[str, Tensor]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{key: value.numpy() for key, value in state.items()})
    return file.getvalue()


NET = _net()
_STATE = NET.state_dict()
FORMATS: dict[str, bytes] = {
    "torch.save": _saved({"state_dict": _STATE, "epoch": 3, "lr": [0.1, 0.2]}),
    "torch.save, with a Path": _saved({"model": _STATE, "root": Path("data")}),
    "a pickled module": _saved(NET),
    "torch.save before 1.6": _saved(_STATE, _use_new_zipfile_serialization=False),
    "safetensors": save({key: value.contiguous() for key, value in _STATE.items()}),
    "npz": _npz(_STATE),
    "a pickle of arrays": pickle.dumps({"model": {key: value.numpy() for key, value in _STATE.items()}}),
}
"""The same network, whose layers ``1`` and ``4`` are batch norms, in each format."""


def mutated(content: bytes, dice: random.Random) -> bytes:
    """Return the content with one to three damages."""
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        content = dice.choice(_DAMAGES)(content, dice)
    return content


def _flip(content: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1 :]


def _text(content: bytes, dice: random.Random) -> bytes:
    """Flip a bit where the names and shapes are: few of the bytes, and most of the sense."""
    marks = [
        place
        for mark in (b"running_", b"data.pkl", b"shape", b"tensor", b"PK\x01\x02")
        if (place := content.find(mark)) >= 0
    ]
    place = min(len(content) - 1, max(0, dice.choice(marks or [0]) + dice.randrange(-40, 120)))
    return content[:place] + bytes([dice.randrange(256)]) + content[place + 1 :]


def _cut(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randrange(1, max(2, len(content)))] or b"\0"


def _drop(content: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(content))
    return content[:place] + content[place + dice.randrange(1, 64) :] or b"\0"


def _repeat(content: bytes, dice: random.Random) -> bytes:
    place, size = dice.randrange(len(content)), dice.randrange(1, 64)
    return content[: place + size] + content[place:]


def _fill(content: bytes, dice: random.Random) -> bytes:
    place, size = dice.randrange(len(content)), dice.choice((1, 4, 8, 64))
    return content[:place] + bytes([dice.choice((0, 0xFF, 0x7F, 0x80))]) * size + content[place + size :]


_DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip,
    _flip,
    _text,
    _text,
    _text,
    _cut,
    _drop,
    _repeat,
    _fill,
)
