"""Which running statistics should this training keep? One run tells, for any number of averages.

The longer the window, the less noisy the statistics, and the further behind the weights: in between is the best length,
and where it is depends on how fast the weights move. All windows of one column are from the same runs, which they do
not touch.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import torch
from digits import Classifier, ConvNet, arguments, digits, fit

from lightning_bn import CompareAverages, Window

SIZES = (1, 2, 5, 10, 20, 50, 100, 200)
LEARNING_RATES = (0.5, 0.02)


def main() -> None:
    options = arguments(__doc__, epochs=4)
    rows = []
    for lr in LEARNING_RATES:
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            compare = CompareAverages({f"window {size}": Window(size) for size in SIZES}, monitor="val_acc", mode="max")
            training, validation = digits(batch_size=16, seed=seed)
            fit(Classifier(ConvNet(8), lr=lr), training, validation, epochs=options.epochs, callbacks=[compare])
            for name, values in compare.scores.values.items():
                label = "torch's 0.1" if name == "own" else name
                rows.append(
                    {"lr": lr, "statistics": label, "mean": 100 * compare.scores.mean(name), "worst": 100 * min(values)}
                )
    table = pd.DataFrame(rows).groupby(["statistics", "lr"], sort=False).mean().unstack("lr")
    table.columns = [f"{value}, lr {lr}" for value, lr in table.columns]
    print(
        f"\nValidation accuracy in percent, mean and worst over {options.epochs} epochs, averaged over {options.seeds} "
        f"seeds\n"
    )
    print(table.to_string(float_format="%.1f"))
    plot(table)


def plot(table: pd.DataFrame) -> None:
    figure, panels = plt.subplots(1, len(LEARNING_RATES), figsize=(9, 3.5), layout="constrained")
    for lr, panel in zip(LEARNING_RATES, panels, strict=True):
        column = table[f"mean, lr {lr}"]
        panel.semilogx(SIZES, column[[f"window {size}" for size in SIZES]], "o-", label="window")
        for name, style in (("torch's 0.1", ":"), ("recalibrated", "--")):
            panel.axhline(column[name], color="grey", linestyle=style, label=name)
        panel.set(title=f"learning rate {lr}", xlabel="window length in batches", ylabel="validation accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig("which_average.png", dpi=120)
    print("\nThe curve is in which_average.png.")


if __name__ == "__main__":
    main()
