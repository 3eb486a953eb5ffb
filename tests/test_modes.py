"""Context managers put back each module's own flag."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_bn.modes import kept_attribute


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def mixed() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()), nn.Linear(2, 2))
    model[1].eval()
    model[1][1].training = True
    return model


def test_each_module_gets_its_own_flag_back() -> None:
    """A deliberate freeze inside a training model survives, and so does a training module inside an eval one; also on
    an exception."""
    model = mixed()
    before = flags(model)
    with kept_attribute(model.modules(), "training"):
        model.train()
    assert flags(model) == before
    with pytest.raises(ValueError, match="2D or 3D"), kept_attribute(model.modules(), "training"):  # noqa: PT012
        model.eval()
        model(torch.empty(2))
    assert flags(model) == before
