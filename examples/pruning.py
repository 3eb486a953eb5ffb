"""Filter pruning: what is left of the network sends other activations into its batch-norm layers.

The filters with the smallest L1 norm go, and with them their channels of the batch norm behind. The statistics of the
deeper layers are then those of the whole network, until they are recalibrated; the weights are not trained again.
"""

from __future__ import annotations

import copy

import pandas as pd
import torch
from digits import Classifier, ConvNet, accuracy, arguments, digits, fit, images_and_labels
from torch import nn

from lightning_bn import recalibrate


@torch.no_grad()
def prune(model: nn.Module, share: float) -> None:
    """Remove the `share` of filters with the smallest L1 norm from each convolution: filter and channel become zero."""
    for block in model.children():
        if isinstance(block, nn.Sequential):
            filters = block.get_parameter("0.weight")
            size = filters.abs().sum((1, 2, 3))
            gone = size.argsort()[: round(share * len(size))]
            for parameter in (filters, block.get_parameter("1.weight"), block.get_parameter("1.bias")):
                parameter[gone] = 0


def main() -> None:
    options = arguments(__doc__, epochs=5)
    rows = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        training, validation = digits(seed=seed)
        module = Classifier(ConvNet(), lr=0.1)
        fit(module, training, epochs=options.epochs)
        images, labels = images_and_labels(validation)
        for share in (0.0, 0.2, 0.4, 0.6):
            pruned = copy.deepcopy(module.model)
            prune(pruned, share)
            row = {"filters pruned": f"{share:.0%}", "stale": accuracy(pruned, images, labels)}
            recalibrate(pruned, training, progress=False)
            rows.append(row | {"recalibrated": accuracy(pruned, images, labels)})
    table = pd.DataFrame(rows).groupby("filters pruned").agg(["mean", "min"])
    table.columns = [f"{statistics}, {'worst' if which == 'min' else which}" for statistics, which in table.columns]
    print(
        f"Validation accuracy in percent, {options.seeds} seeds, {options.epochs} epochs, no training after the "
        f"pruning\n"
    )
    print(table.to_string(float_format="%.1f"))


if __name__ == "__main__":
    main()
