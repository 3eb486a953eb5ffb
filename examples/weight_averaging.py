"""An exponential moving average of the weights, with the statistics of other weights and with its own.

With ``use_buffers=False``, torch's `AveragedModel` and Lightning's callbacks give the averaged weights the running
statistics of the last training step; with ``use_buffers=True`` an average of the statistics of all steps, the untrained
ones among them. `BatchNormRecalibration` gives them their own when the training ends; its report can take those back.
"""

from __future__ import annotations

import itertools

import pandas as pd
import torch
from digits import Classifier, ConvNet, accuracy, arguments, digits, fit, images_and_labels
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_bn import BatchNormRecalibration


def main() -> None:
    options = arguments(__doc__, epochs=4)
    rows = []
    for seed in range(options.seeds):
        images, labels = images_and_labels(digits(seed=seed)[1])
        for decay, use_buffers in itertools.product((0.98, 0.995), (False, True)):
            torch.manual_seed(seed)
            training, _ = digits(seed=seed)
            module = Classifier(ConvNet(), lr=0.5)
            repair = BatchNormRecalibration(num_batches=None)
            fit(
                module,
                training,
                epochs=options.epochs,
                callbacks=[EMAWeightAveraging(decay=decay, use_buffers=use_buffers), repair],
            )
            after = accuracy(module, images, labels)
            if repair.report is not None:
                repair.report.rollback()
            rows.append(
                {"decay": decay, "use_buffers": use_buffers, "before": accuracy(module, images, labels), "after": after}
            )
    table = pd.DataFrame(rows).groupby(["decay", "use_buffers"]).agg(["mean", "min"])
    table.columns = [f"{'worst' if which == 'min' else which} {moment}" for moment, which in table.columns]
    print("Validation accuracy in percent of averaged weights before and after the recalibration,")
    print(f"{options.seeds} seeds, {options.epochs} epochs of 43 steps\n")
    print(table.to_string(float_format="%.1f"))


if __name__ == "__main__":
    main()
