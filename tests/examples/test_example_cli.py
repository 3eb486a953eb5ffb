"""The walk of examples/cli: every command that stands at the head of its config."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_bn.cli import main

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """fit, inspect, recalibrate, validate: each ends with 0, and the last prints the train/eval gap of what the first
    trained."""
    shutil.copytree(EXAMPLES / "cli", tmp_path / "cli")
    shutil.copy(EXAMPLES / "digits.py", tmp_path)
    monkeypatch.chdir(tmp_path / "cli")
    monkeypatch.delitem(sys.modules, "main", raising=False)
    lines = Path("config.yaml").read_text().splitlines()
    fit, *commands = (shlex.split(line.removeprefix("# ")) for line in lines if line.startswith("# "))
    assert fit[0] == "python"
    assert [command[:2] for command in commands] == [
        ["lightning-bn", name] for name in ("inspect", "recalibrate", "validate")
    ]
    done = subprocess.run(
        [sys.executable, *fit[1:], "--trainer.max_epochs=1", "--trainer.limit_train_batches=10"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for command in commands:
        assert main(command[1:]) == 0
    header, *rows = capsys.readouterr().out.splitlines()[-3:]
    assert header.split(maxsplit=3) == ["metric", "checkpoint", "recalibrated", "batch statistics"]
    assert [row.split()[0] for row in rows] == ["val_loss", "val_acc"]
    assert all(0 < float(value) < 10 for row in rows for value in row.split()[1:])
    assert Path("runs/digits-recalibrated.ckpt").is_file()
    assert "main" in sys.modules
    monkeypatch.delitem(sys.modules, "main")
