"""examples/mistakes.py names each of its three mistakes, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable


def test_names_each_mistake(run_example: Callable[..., tuple[str, str]]) -> None:
    """One finding under each title."""
    with warnings.catch_warnings():
        out, _ = run_example("mistakes", "--epochs", "1")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("BN")] == ["BN102", "BN201", "BN104"]
