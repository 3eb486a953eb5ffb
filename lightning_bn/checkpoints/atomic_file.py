"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def write_atomically(checkpoint: Any, path: Path) -> None:
    """Save `checkpoint` as `path`, by `torch.save`: a kill, or a power cut, at any moment leaves the file that was
    there, or the new one.

    A process that is killed on the way leaves a hidden file, which the next one overwrites.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name is on the disk once the directory is
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
