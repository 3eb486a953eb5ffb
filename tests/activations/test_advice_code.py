"""The code that a sick statistic advises runs as it is printed."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_bn import Window, convert_batch_norm
from lightning_bn.activations.registry import STATISTICS
from lightning_bn.rules.page import rule_page

CODE = [code for each in STATISTICS.values() for code in (each.code, each.code_low) if code]


@pytest.mark.parametrize("code", dict.fromkeys(CODE))
def test_it_runs(code: str) -> None:
    """As printed, with the model and the usual names in reach."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    names = {"model": model, "nn": nn, "torch": torch, "Trainer": Trainer, "Window": Window}
    names |= {"convert_batch_norm": convert_batch_norm}
    names |= {"norm_weights": [model[1].weight], "others": list(model[0].parameters())}
    try:
        exec(code, names)
    finally:
        torch.autograd.set_detect_anomaly(False)


@pytest.mark.parametrize("name", [name for name, each in STATISTICS.items() if each.rule])
def test_the_rule_has_a_page(name: str) -> None:
    """Which the journal takes along."""
    assert rule_page(STATISTICS[name].rule).startswith(f"# {STATISTICS[name].rule} ")
