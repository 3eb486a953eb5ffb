"""The whole product on one screen: average, watch, guard and repair batch norm on scikit-learn's handwritten digits."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import lightning.pytorch as pl
from digits import Classifier, ConvNet, digits
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_bn import (
    ActivationStatsMonitor,
    BatchNormRecalibration,
    CompareAverages,
    Exponential,
    ModeCheck,
    Window,
    convert_batch_norm,
    recalibrate,
)
from lightning_bn.dashboard.report import find_journal, report_html, run_name

# Advertisements, and warnings about Lightning's own code and the size of the data.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module="lightning")


def main() -> None:
    pl.seed_everything(0, verbose=False)
    training, validation = digits(batch_size=32)

    # Average: inference statistics are those of the last 20 training batches. Training is the same to the bit.
    module = Classifier(convert_batch_norm(ConvNet(), Window(20)), lr=0.5)

    compare = CompareAverages({"exponential 0.1": Exponential(0.1), "exponential 0.01": Exponential(0.01)})
    guard = ModeCheck()
    repair = BatchNormRecalibration(num_batches=None)
    trainer = pl.Trainer(
        max_epochs=8,
        accelerator="cpu",
        logger=TensorBoardLogger("runs", name="quickstart"),
        log_every_n_steps=10,
        enable_model_summary=False,
        callbacks=[ActivationStatsMonitor(), guard, compare, repair],
    )
    trainer.fit(module, training, validation)

    print("\nThe same weights, evaluated on 400 validation images with other running statistics:\n")
    print(f"{'running statistics':<22}{'accuracy':>10}{'loss':>10}")
    names = {
        "exponential 0.1": "exponential 0.1",
        "exponential 0.01": "exponential 0.01",
        "own": "window 20",
        "recalibrated": "recalibrated",
    }
    for name, title in names.items():
        print(f"{title:<22}{compare.metrics[name]['val_acc']:>10.3f}{compare.metrics[name]['val_loss']:>10.3f}")

    print(f"\nModeCheck: {len(guard.findings) or 'no'} findings.")
    print(f"\nWhat recalibration after training changed:\n\n{repair.report}")
    print("\nOnce more by hand, to see whether anything is left to repair: ", end="")
    again = recalibrate(module, training, dry_run=True, progress=False)
    print(
        f"the largest mean shift is now {max(layer.mean_shift_max for layer in again.layers):.2f} standard deviations."
    )
    # The page about the run; TensorBoard has the same as its tab "Batch norm".
    journal = find_journal(Path(trainer.log_dir))
    Path("report.html").write_text(report_html({run_name(journal): journal}), encoding="utf-8")
    print("\nThe run at a glance is in report.html: open it in a browser. The same, live, in TensorBoard:")
    print(f"\n    .venv/bin/tensorboard --logdir {trainer.logger.save_dir}  # the tab: Batch norm\n")


if __name__ == "__main__":
    main()
