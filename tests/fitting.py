"""Real runs so small that a fit takes a fraction of a second: the one Trainer of the tests, and the usual fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_data import loader, training_data
from small_models import Small
from torch.utils.data import DataLoader


def trainer(*callbacks: Any, package: ModuleType = pl, **options: Any) -> Any:
    """Return a silent Trainer of one epoch on one CPU, which writes to the current directory if anywhere.

    `package` is the Lightning whose Trainer it is.
    """
    checkpoints = any(isinstance(callback, package.callbacks.Checkpoint) for callback in callbacks)
    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_checkpointing": checkpoints}
    return package.Trainer(**{"callbacks": list(callbacks), **silent, **defaults, **options})


def fit(
    *callbacks: pl.Callback,
    module: pl.LightningModule | None = None,
    train: Any = None,
    val: Any = "default",
    ckpt_path: Any = None,
    **options: Any,
) -> tuple[pl.LightningModule, pl.Trainer]:
    """Fit a `Small` from seed 0 on `training_data` for two epochs, and return it with its Trainer."""
    torch.manual_seed(0)
    module = Small() if module is None else module
    torch.manual_seed(1)
    runner = trainer(*callbacks, **{"max_epochs": 2, **options})
    val = DataLoader(training_data(), 16) if isinstance(val, str) else val
    if val is None:  # else Lightning warns of a missing loader
        module.validation_step = pl.LightningModule.validation_step.__get__(module)
    runner.fit(module, loader() if train is None else train, val, ckpt_path=ckpt_path, weights_only=False)
    return module, runner


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning says of tiny runs: few workers, eval modes, intervals; a wrong program's warnings are its
    own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        yield


class SaveAtStep7(pl.Callback):
    """Save a checkpoint in the middle of an epoch and of a window."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == 7:
            trainer.save_checkpoint(self.path)
