"""Imports torchvision, if it is installed, also where its compiled part was built for another torch, such as PyPI's for
CUDA beside a torch for CPUs: timm and mosaicml's loaders import it, torchmetrics does where it is there, and nothing
that is tested calls it. To be imported before lightning."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

import torch

_declared: list[torch.library.Library] = []  # if it is collected, its declarations are gone

if find_spec("torchvision") is not None:
    try:
        import_module("torchvision")
    except RuntimeError:  # "operator torchvision::nms does not exist", of which it declares another form
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        for _operator in ("nms", "qnms"):
            _declared[0].define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for _name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[_name]
        import_module("torchvision")
