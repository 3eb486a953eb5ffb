"""What lightning-bn tells and mends, on one screen: a mistake, a sick layer, and averaged weights, on 1797 digits."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from digits import Classifier, ConvNet, accuracy, digits, fit, images_and_labels
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_bn import ActivationStatsMonitor, BatchNormRecalibration, ModeCheck

SEEDS = 3
EPOCHS = 4
STEP = 40


class BreakLayer(pl.Callback):
    """Makes a layer sick on purpose: from one step on, no unit of it is ever active again."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == STEP:
            nn.init.constant_(self.layer.get_parameter("bias"), -6.0)


def watched_run() -> str:
    """Train a network with two things wrong; print what the callbacks say, and return where the run is."""
    pl.seed_everything(0, verbose=False)
    model = ConvNet()
    model[1].eval()  # a mistake: this block is trained in eval mode, as pretrained models are loaded
    monitor, guard = ActivationStatsMonitor(every_n_steps=5, verbose=False), ModeCheck(action="log")
    logger = TensorBoardLogger("runs", name="quickstart")
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BreakLayer(model.get_submodule("2.1")), monitor, guard],
    )
    trainer.fit(Classifier(model, lr=0.3), *digits())
    print("1. A block, model[1], was left in eval mode. ModeCheck says:\n")
    print(next(finding for finding in guard.findings if finding.code == "BN102"))
    print(f"\n2. At step {STEP} the units of another, model[2], were switched off. ActivationStatsMonitor says:\n")
    print("\n".join(monitor.verdict()[:3]), flush=True)
    return str(logger.log_dir)


def averaged(decay: float, seed: int) -> tuple[float, float]:
    """Return the accuracy of averaged weights, in percent of 400 images, before and after their recalibration."""
    torch.manual_seed(seed)
    training, validation = digits(seed=seed)
    module, repair = Classifier(ConvNet(), lr=0.5), BatchNormRecalibration(num_batches=None)
    fit(module, training, epochs=EPOCHS, callbacks=[EMAWeightAveraging(decay=decay), repair])
    after = accuracy(module, *images_and_labels(validation))
    if repair.report is not None:
        repair.report.rollback()
    return accuracy(module, *images_and_labels(validation)), after


def main() -> None:
    # Lightning's remarks on workers, devices and loggers.
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("Handwritten digits, a small network with batch norm, and three things that go wrong without an error.")
    print("About half a minute.\n", flush=True)
    folder = watched_run()

    print("\n3. Averaged weights (EMA) keep statistics of other weights. BatchNormRecalibration mends them:\n")
    print(f"   {'decay':<8}{'before':>22}{'after':>22}")
    for decay in (0.98, 0.995):
        rows = [averaged(decay, seed) for seed in range(SEEDS)]
        cells = [f"{sum(each) / SEEDS:.1f} ({min(each):.1f} to {max(each):.1f})" for each in zip(*rows, strict=True)]
        print(f"   {decay:<8}" + "".join(f"{cell:>22}" for cell in cells))
    print(f"\n   Percent of 400 images: mean of {SEEDS} seeds (least to greatest), {EPOCHS} epochs of 43 steps.")
    print("   0.98 has forgotten the start of training, and gains little; 0.995 has not, and is at chance before.")
    print(f"\nThe run as a page: .venv/bin/lightning-bn report {folder}, then open report.html.")


if __name__ == "__main__":
    main()
