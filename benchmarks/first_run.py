"""What the monitor costs a first run: a fit of 220 small steps that logs to TensorBoard, with and without it.

Each run is a process of its own, as a first run is, with one thread.
Counted is the CPU time of the process from the making of its Trainer to the end of the fit, imports included.
Variants take turns; printed are medians, and the medians of the rounds' ratios to the plain run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tqdm import tqdm

from lightning_bn import ActivationStatsMonitor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from digits import Classifier, ConvNet, digits

VARIANTS = {
    "plain": list,
    "plain again (noise)": list,
    "monitor": lambda: [ActivationStatsMonitor()],
    "monitor, pictures too": lambda: [ActivationStatsMonitor(heatmaps=True)],
}
EPOCHS = 5  # of 44 steps


def seconds(variant: str) -> float:
    """Return the CPU time of one fit, in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pl.seed_everything(0, verbose=False)
    model, loaders = Classifier(ConvNet()), digits()
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        trainer = pl.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            logger=TensorBoardLogger(folder),
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=VARIANTS[variant](),
        )
        trainer.fit(model, *loaders)
        spent = time.process_time() - started
    assert trainer.global_step >= 215
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variant", choices=VARIANTS, help="run this one, in this process, and print its seconds")
    options = parser.parse_args()
    if options.variant:
        print(seconds(options.variant))
        return
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in tqdm(range(options.rounds), unit="round"):
        for place in range(len(VARIANTS)):
            name = list(VARIANTS)[(place + number) % len(VARIANTS)]
            command = [sys.executable, __file__, "--variant", name]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            found[name].append(float(done.stdout.split()[-1]))
    print(f"\nmedians of {options.rounds} rounds\n\n| run | CPU seconds | relative |\n|---|---:|---:|")
    for name, each in found.items():
        ratio = statistics.median(a / b for a, b in zip(each, found["plain"], strict=True))
        print(f"| {name} | {statistics.median(each):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
