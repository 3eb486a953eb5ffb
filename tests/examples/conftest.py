"""The examples run in this process as their readers run them, without the seconds that another one takes to import."""

from __future__ import annotations

import logging
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Run an example with arguments, and return what it wrote to stdout and stderr."""
    logger, threads = logging.getLogger("lightning.pytorch"), torch.get_num_threads()
    monkeypatch.setattr(logger, "level", logger.level)  # the examples silence it for good, as a script may
    monkeypatch.setenv("MPLBACKEND", "Agg")

    def run(name: str, *arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        finally:
            plt.close("all")
            torch.set_num_threads(threads)
        output = capsys.readouterr()
        return output.out, output.err

    return run
