"""Statistics that the file of a peft adapter does not hold."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_bn import recalibrate

BATCHES = [torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(seed)) + 3 for seed in range(3)]


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(images))


class Adapted(nn.Module):
    """What peft makes of a model, as far as it is looked at: classes of its own around the base model."""

    def __init__(self, *, saved: bool) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = Base()
        self.peft_config: dict[str, Any] = {}
        if saved:
            wrapper = type("ModulesToSaveWrapper", (nn.Module,), {"__module__": "peft.utils.other"})()
            wrapper.modules_to_save = nn.ModuleDict({"default": self.base_model.model.norm})
            wrapper.forward = wrapper.modules_to_save["default"].__call__
            self.base_model.model.norm = wrapper

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.base_model.model(images)


Adapted.__module__ = "peft.peft_model"


@pytest.mark.parametrize("inside", [False, True])
def test_statistics_that_are_not_saved_are_told(inside: bool) -> None:
    """By the layer's name in the base model, with the argument that saves it; also where the adapter is a part."""
    model = nn.Sequential(Adapted(saved=False)) if inside else Adapted(saved=False)
    with pytest.warns(UserWarning, match=r"norm belong.*save_pretrained.*modules_to_save=\['norm'\]"):
        recalibrate(model, BATCHES, progress=False)


def test_statistics_that_are_saved_are_not_told() -> None:
    """Those of a layer that is saved with the adapter, and of a model without one."""
    for model in (Adapted(saved=True), Base()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            recalibrate(model, BATCHES, progress=False)


@pytest.mark.parametrize("saved", [False, True])
def test_pefts_own_files(saved: bool, tmp_path: Path) -> None:
    """The warning is true of peft itself, and so is the mend: a loaded adapter answers as the model did."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = Base()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    config = {"modules_to_save": ["norm"]} if saved else {}
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["conv"], r=2, **config))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recalibrate(model, BATCHES, layers="all", progress=False)
    assert any("save_pretrained" in str(each.message) for each in caught) is not saved
    expected = model.eval()(BATCHES[0])
    model.save_pretrained(tmp_path)
    other = Base()
    other.load_state_dict(state)
    loaded = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    assert torch.allclose(loaded(BATCHES[0]), expected, atol=1e-5) is saved
