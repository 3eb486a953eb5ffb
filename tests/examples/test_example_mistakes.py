"""examples/mistakes.py names each of its three mistakes, and nothing else."""

from __future__ import annotations

import logging
import runpy
import warnings
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "mistakes.py"


def test_names_each_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One finding under each title."""
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), "--epochs", "1"])
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "level", logger.level)  # the example silences it for good
    with warnings.catch_warnings():
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    found = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("BN")]
    assert found == ["BN102", "BN201", "BN104"]
