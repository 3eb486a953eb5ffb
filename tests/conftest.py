"""What all tests share: the devices that are there, and a fixed seed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# Tests may use what the examples share.
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

DEVICES = ["cpu"]
if torch.accelerator.is_available():
    DEVICES.append(torch.accelerator.current_accelerator().type)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device on this machine in turn."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer without a logger leaves its journal in the current directory."""
    monkeypatch.chdir(tmp_path_factory.mktemp("current"))
