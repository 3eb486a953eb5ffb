"""The examples that look inside networks run, print their tables and draw their pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from limits import limit

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


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
def test_example(name: str, pictures: set[str], words: tuple[str, ...], tmp_path: Path) -> None:
    """After one epoch each, the example has printed its table and left one PNG a picture."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--epochs", "1", "--images", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit(250))
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words)
    found = {path.stem: path.read_bytes()[:8] for path in tmp_path.glob("*.png")}
    assert found == dict.fromkeys(pictures, b"\x89PNG\r\n\x1a\n")
