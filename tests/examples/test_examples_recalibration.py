"""The examples of recalibration run as their readers run them, and print their tables."""

from __future__ import annotations

import logging
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def numbers(line: str) -> list[float]:
    return [float(word) for word in line.split() if word.replace(".", "", 1).isdigit() and "." in word]


@pytest.fixture(autouse=True)
def _process_settings() -> Iterator[None]:
    """The examples silence Lightning's logger and take one thread, as a script may."""
    logger, threads = logging.getLogger("lightning.pytorch"), torch.get_num_threads()
    level = logger.level
    yield
    logger.setLevel(level)
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:.*has no `val_dataloader`|You defined a `validation_step`")
@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [("which_average", 10, 4), ("weight_averaging", 4, 4), ("domain_shift", 3, 5), ("pruning", 4, 4)],
)
def test_an_example_prints_its_table(
    name: str,
    rows: int,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One row a case, percentages in every column, and no other output."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--seeds", "1", "--epochs", "1"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    output = capsys.readouterr()
    lines = [numbers(line) for line in output.out.splitlines() if "lr" not in line]
    table = [line[-columns:] for line in lines if len(line) >= columns]
    assert len(table) == rows
    assert all(0 <= value <= 100 for row in table for value in row)
    assert output.err == ""
    if name == "which_average":
        assert (tmp_path / "which_average.png").stat().st_size > 1000
