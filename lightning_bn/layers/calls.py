"""What a batch-norm layer was called with, whatever its class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["input_and_mask"]


def input_and_mask(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return what a call of `layer` normalises, and the mask, if a layer of this package is given one.

    The second argument of another package's forward may mean something else.
    """
    # torch.compile of 2.6 and 2.7 knows no zip(strict=...).
    given = dict(zip(("input", "mask"), args)) | kwargs  # noqa: B905
    mask = given.get("mask")
    if not (getattr(type(layer), "takes_mask", False) and isinstance(mask, Tensor) and mask.dtype == torch.bool):
        mask = None
    return given["input"] if "input" in given else next(iter(given.values())), mask
