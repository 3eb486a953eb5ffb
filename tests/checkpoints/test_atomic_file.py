"""A file is written whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bn.checkpoints.atomic_file import write_atomically


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Unpicklable:
    def __reduce__(self) -> Any:
        raise ValueError("injected")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    """Neither half a file nor a temporary one stays behind, and an earlier file under the name is whole."""
    path = tmp_path / "a.ckpt"
    write_atomically({"value": 1}, path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="injected"):
        write_atomically({"large": torch.zeros(1000), "value": Unpicklable()}, path)
    assert contents(tmp_path) == before


KILLED = """
import os, signal
from pathlib import Path
from lightning_bn.checkpoints import atomic_file
moment = {moment!r}
stop = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if moment == "rename":
    os.replace = stop
elif moment == "fsync":
    os.fsync = stop
else:
    inner = atomic_file.torch.save
    def half(value, file):
        file.write(b"PK half a file")
        file.flush()
        stop()
    atomic_file.torch.save = half
atomic_file.write_atomically(dict(value=2), Path({path!r}))
"""


@pytest.mark.parametrize("moment", ["write", "fsync", "rename"])
def test_a_kill_leaves_the_original_and_no_half_file(moment: str, tmp_path: Path) -> None:
    """A process that is killed while it writes, before the data are on the disk, or before the rename, changes no file
    that is there."""
    path = tmp_path / "last-recalibrated.ckpt"
    write_atomically({"value": 1}, path)
    (tmp_path / "last.ckpt").write_bytes(b"original")
    before = contents(tmp_path)
    script = KILLED.format(moment=moment, path=str(path))
    process = subprocess.run([sys.executable, "-c", script], check=False)
    assert process.returncode == -signal.SIGKILL
    after = {name: value for name, value in contents(tmp_path).items() if not name.endswith(".unfinished")}
    assert after == before
    # The next run is not disturbed by what is left.
    write_atomically({"value": 3}, path)
    assert set(contents(tmp_path)) == set(before)
    assert torch.load(path)["value"] == 3
