"""Four networks on digits, three of them sick: what the monitor finds, and the pictures in docs/inspecting.md."""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from digits import Classifier, ConvNet, digits
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imsave
from torch import nn

from lightning_bn import ActivationStatsMonitor

for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(name).setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module="lightning")


def without_norm(gain: float) -> nn.Sequential:
    """Eight convolutions with ReLUs and no batch norm; weights drawn as He et al. (2015) do, times `gain`."""
    model = nn.Sequential()
    for number in range(1, 9):
        convolution = nn.Conv2d(1 if number == 1 else 16, 16, 3, padding=1)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        convolution.weight.data *= gain
        model.add_module(f"conv{number}", convolution)
        model.add_module(f"relu{number}", nn.ReLU())
    return model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)])


def lagging() -> nn.Module:
    """Batch norm whose average has a memory of two thousand batches."""
    model = ConvNet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.001
    return model


# Name, network, learning rate, and the statistic in which its illness shows.
CASES = (
    ("healthy", ConvNet, 0.1, "dead_fraction"),
    ("dead_relu", lambda: without_norm(1.0), 2.0, "dead_fraction"),
    ("exploding", lambda: without_norm(4.0), 0.001, "std"),
    ("lagging", lagging, 0.5, "drift_var"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=Path, help="folder for the pictures, as in docs/images")
    parser.add_argument("--logs", type=Path, help="folder for TensorBoard, a run for each network")
    options = parser.parse_args()
    # Networks that go to pieces do so in another way after each rounding, which depends on the number of threads.
    torch.set_num_threads(1)
    for name, build, lr, statistic in CASES:
        pl.seed_everything(0, verbose=False)
        monitor = ActivationStatsMonitor(every_n_steps=2, verbose=False)
        trainer = pl.Trainer(
            max_epochs=options.epochs,
            accelerator="cpu",
            logger=TensorBoardLogger(options.logs, name=name, version="") if options.logs else False,
            default_root_dir=tempfile.gettempdir(),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[monitor],
        )
        trainer.fit(Classifier(build(), lr=lr), *digits(batch_size=64))
        print(f"{name}: accuracy {float(trainer.callback_metrics['val_acc']):.2f}")
        print(f"{monitor}\n")
        if options.images:
            imsave(options.images / f"{name}.png", monitor.picture(statistic))


if __name__ == "__main__":
    main()
