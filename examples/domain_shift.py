"""Covariate shift adaptation (Schneider et al. 2020): the statistics of a few unlabelled images of another domain.

Trained on clean digits, evaluated on digits with less contrast or with noise. `recalibrated` takes the statistics of
four images of the other domain, alone (prior 0) or blended with those of training, which count as `prior` images.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from digits import Classifier, ConvNet, accuracy, arguments, digits, fit, images_and_labels
from torch import Tensor

from lightning_bn import recalibrated

SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda images: images,
    "contrast": lambda images: 0.4 * images + 0.3,
    "noise": lambda images: images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)),
}
PRIORS = {"prior 0": 0.0, "prior 4": 4.0, "prior 16": 16.0}


def main() -> None:
    options = arguments(__doc__, epochs=5)
    rows = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        training, validation = digits(seed=seed)
        module = Classifier(ConvNet(), lr=0.1)
        fit(module, training, epochs=options.epochs)
        images, labels = images_and_labels(validation)
        for shift, distort in SHIFTS.items():
            shifted = distort(images)
            row = {"shift": shift, "no adaptation": accuracy(module, shifted, labels)}
            for name, prior in PRIORS.items():
                with recalibrated(module, [shifted[:4]], prior=prior, progress=False):
                    row[f"4 images, {name}"] = accuracy(module, shifted[4:], labels[4:])
            with recalibrated(module, [shifted[:200]], progress=False):
                row["200 images, prior 0"] = accuracy(module, shifted[200:], labels[200:])
            rows.append(row)
    table = pd.DataFrame(rows).groupby("shift", sort=False).mean()
    print(
        f"Validation accuracy in percent, mean of {options.seeds} seeds, {options.epochs} epochs; adapted on images "
        f"without labels,"
    )
    print("which are then left out of the accuracy\n")
    print(table.to_string(float_format="%.1f"))


if __name__ == "__main__":
    main()
