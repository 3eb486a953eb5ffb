"""The examples of recalibration run as their readers run them, and print their tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def numbers(line: str) -> list[float]:
    return [float(word) for word in line.split() if word.replace(".", "", 1).isdigit() and "." in word]


@pytest.mark.filterwarnings("ignore:.*has no `val_dataloader`|You defined a `validation_step`")
@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("which_average", 10, 4),
        ("weight_averaging", 4, 4),
        ("domain_shift", 3, 5),
        ("pruning", 4, 4),
        ("slimmable", 4, 6),
        ("two_domains", 6, 3),
        ("live_data", 5, 2),
    ],
)
def test_an_example_prints_its_table(
    name: str, rows: int, columns: int, run_example: Callable[..., tuple[str, str]]
) -> None:
    """One row a case, percentages in every column, and no other output."""
    out, err = run_example(name, "--seeds", "1", "--epochs", "1")
    lines = [numbers(line) for line in out.splitlines() if "lr" not in line]
    table = [line[-columns:] for line in lines if len(line) >= columns]
    assert len(table) == rows
    assert all(0 <= value <= 100 for row in table for value in row)
    assert err == ""
    if name == "which_average":
        assert Path("which_average.png").stat().st_size > 1000
