"""timm and mosaicml's loaders import torchvision, whose compiled part may have been built for another torch, such as
PyPI's for CUDA beside a torch for CPUs. Nothing that is tested calls it."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import torch

_DECLARED: list[torch.library.Library] = []  # if it is collected, its declarations are gone


def import_torchvision() -> None:
    """Import torchvision, if it is installed, also where its operations are not there."""
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError:  # "operator torchvision::nms does not exist", of which it declares another form
        _DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))
        for operator in ("nms", "qnms"):
            _DECLARED[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision  # noqa: F401
