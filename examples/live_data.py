"""Live data judged without labels: a spread measured on clean digits, then alarms on clean, brighter, noisy and rotated
ones.

The network serves batches of four images. It is recalibrated on digits that it was not trained on, of which the layers
keep how much one differs from another; neither images nor labels are kept. What is printed is the share of batches that
give an alarm, of which 5 percent are false on clean data, and the accuracy, which no alarm tells.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pandas as pd
import torch
from digits import Classifier, ConvNet, accuracy, arguments, digits, fit, images_and_labels
from torch import Tensor

from lightning_bn import recalibrate, watch_drift

SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda images: images,
    "brightness": lambda images: images + 0.1,
    "contrast": lambda images: 0.7 * images,
    "noise": lambda images: images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)),
    "rotation": lambda images: images.rot90(1, (2, 3)),
}


def alarms(module: Classifier, images: Tensor) -> float:
    """Return the percentage of batches of four that give an alarm."""
    with watch_drift(module, alarm=0.05) as watch, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the first alarm's table
        for batch in images.split(4):
            module(batch)
    return 100 * watch.alarms / watch.batches


def main() -> None:
    options = arguments(__doc__, epochs=5)
    rows = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        training, validation = digits(seed=seed)
        module = Classifier(ConvNet(), lr=0.1)
        fit(module, training, epochs=options.epochs)
        module.eval()
        images, labels = images_and_labels(validation)
        recalibrate(module, [images[:250]], spread=True, progress=False)
        for shift, distort in SHIFTS.items():
            shifted = distort(images[250:])
            row = {
                "shift": shift,
                "alarms": alarms(module, shifted),
                "accuracy": accuracy(module, shifted, labels[250:]),
            }
            rows.append(row)
    table = pd.DataFrame(rows).groupby("shift", sort=False).mean()
    print(f"Alarms and accuracy in percent, batches of 4, mean of {options.seeds} seeds, {options.epochs} epochs\n")
    print(table.to_string(float_format="%.1f"))


if __name__ == "__main__":
    main()
