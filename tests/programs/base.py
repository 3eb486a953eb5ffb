"""What the programs share: a registry, parts of networks, views of a batch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from small_models import Block, Module, Net
from torch import Tensor, nn

__all__ = ["PROGRAMS", "Block", "Module", "Net", "Program", "average", "backbone", "mlp", "program", "views"]


class Program(NamedTuple):
    """How a program is made and run."""

    make: Callable[[], pl.LightningModule]
    callbacks: tuple[Callable[[], pl.Callback], ...]
    options: dict[str, Any]
    forward: Callable[[Any, Any], Any] | None
    """How a batch goes in, where neither ``forward`` nor ``training_step`` can tell."""


PROGRAMS: dict[str, Program] = {}
"""Every program by its name."""


def program(
    *callbacks: Callable[[], pl.Callback], forward: Callable[[Any, Any], Any] | None = None, **options: Any
) -> Callable[[Any], Any]:
    """Register a module's class, to be run next to `callbacks` by a Trainer of `options`."""

    def register(make: Any) -> Any:
        assert make.__name__ not in PROGRAMS
        PROGRAMS[make.__name__] = Program(make, callbacks, options, forward)
        return make

    return register


def backbone() -> nn.Module:
    """Images to 16 features."""
    return nn.Sequential(Block(1, 4), Block(4, 4), nn.Flatten())


def mlp(*sizes: int, last: bool = False) -> nn.Module:
    """Linear layers, with batch norms between them and, if `last`, one without affine parameters at the end."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    layers = layers[:-2]
    return nn.Sequential(*layers, *[nn.BatchNorm1d(sizes[-1], affine=False)] * last)


def views(images: Tensor, number: int = 2) -> list[Tensor]:
    """Return augmentations of a batch."""
    return [
        images.flip(-1) * (view % 2) + images * (1 - view % 2) + 0.1 * torch.randn_like(images)
        for view in range(number)
    ]


@torch.no_grad()
def average(teacher: nn.Module, student: nn.Module, weight: float = 0.1, *, buffers: bool = False) -> None:
    """Move the teacher's parameters, or its whole state, towards the student's."""
    for own, other in zip(teacher.parameters(), student.parameters(), strict=True):
        own.lerp_(other, weight)
    if buffers:
        for own, other in zip(teacher.buffers(), student.buffers(), strict=True):
            own.copy_(other)


def contrast(one: Tensor, other: Tensor) -> Tensor:
    """Return the InfoNCE loss of two batches of vectors."""
    logits = F.normalize(one, dim=1) @ F.normalize(other, dim=1).T / 0.5
    return F.cross_entropy(logits, torch.arange(len(one)))
