"""The examples that look inside networks run, print their tables and draw their pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "pictures", "words"),
    [
        ("sick_network", {"healthy", "dead_relu", "exploding", "lagging"}, ("healthy", "since step", "To do: ")),
        (
            "inside_batch_norm",
            {"bn_shift", "bn_learning_rates", "bn_gradients", "bn_relu", "bn_statistics"},
            ("learning rate", "share below zero", "window of 20"),
        ),
    ],
)
def test_example(
    name: str, pictures: set[str], words: tuple[str, ...], tmp_path: Path, run_example: Callable[..., tuple[str, str]]
) -> None:
    """After one epoch each, the example has printed its table and left one PNG a picture."""
    out, _ = run_example(name, "--epochs", "1", "--images", str(tmp_path))
    assert all(word in out for word in words)
    found = {path.stem: path.read_bytes()[:8] for path in tmp_path.glob("*.png")}
    assert found == dict.fromkeys(pictures, b"\x89PNG\r\n\x1a\n")
