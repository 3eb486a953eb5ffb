"""Statistics that differ from rank to rank."""

from __future__ import annotations

import contextlib
import io
import pickle
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from digits import Classifier, ConvNet, digits, quiet_trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from costs.base import Batch, Outcome, Setting, mistake
from lightning_bn import BatchNormSync, ModeCheck

APART = "two ranks with classes of their own, `broadcast_buffers=False`"


class HalfTheClasses(Classifier):
    """Each of two ranks trains on digits of its own, and validates on all of them."""

    def __init__(self, seed: int) -> None:
        super().__init__(ConvNet())
        self.seed = seed

    def train_dataloader(self) -> Any:
        images, labels = digits(seed=self.seed)[0].dataset[:]
        own = (labels >= 5) == bool(self.global_rank)
        return DataLoader(TensorDataset(images[own], labels[own]), 16, shuffle=True, drop_last=True)

    def val_dataloader(self) -> Any:
        return digits(seed=self.seed)[1]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        accuracy = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_acc", accuracy, sync_dist=True)


class Reports(pl.Callback):
    """Leaves the findings of rank 0 in a file, since the objects of a process end with it."""

    def __init__(self, check: ModeCheck, file: Path) -> None:
        self.check, self.file = check, file

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.file.write_bytes(pickle.dumps(self.check.findings))


@mistake("BN306", f"{APART}; mended by `broadcast_buffers=True`", sync=False)
@mistake("BN306", f"{APART}; mended by `BatchNormSync()`", sync=True)
def apart(setting: Setting, mend: bool, sync: bool) -> Outcome:
    module, check = HalfTheClasses(setting.seed), ModeCheck(action="log")
    strategy = DDPStrategy(start_method="fork", broadcast_buffers=mend and not sync)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder) / "findings"
        trainer = quiet_trainer(
            setting.epochs,
            [check, Reports(check, file)],
            strategy=strategy,
            devices=2,
            use_distributed_sampler=False,
            limit_train_batches=40,  # alike on both ranks, which have not quite as many images
            plugins=[BatchNormSync()] * (mend and sync),
        )
        trainer.fit(module)
        # The module of this process is not the one that was trained.
        return Outcome(100 * float(trainer.callback_metrics["val_acc"]), pickle.loads(file.read_bytes()))
