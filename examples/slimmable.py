"""A slimmable network (Yu et al. 2019): one set of weights that runs at four widths.

A narrow network uses the first channels of each layer. Its activations have other statistics than the wide one's, so
one set of running statistics fits none of the widths; with `StatisticsSets` each width has its own. All widths are
trained in each step, with one backward.
"""

from __future__ import annotations

import lightning.pytorch as pl
import pandas as pd
import torch
import torch.nn.functional as F
from digits import accuracy, arguments, digits, fit, images_and_labels
from torch import Tensor, nn

from lightning_bn import StatisticsSets

WIDTHS = (1.0, 0.75, 0.5, 0.25)


class SlimConv2d(nn.Conv2d):
    """Takes as many channels as come, and gives a share of its own."""

    share = 1.0

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight[: int(self.out_channels * self.share), : input.shape[1]]
        return F.conv2d(input, weight, None, self.stride, self.padding)


class SlimBatchNorm2d(nn.BatchNorm2d):
    """Normalises as many channels as come with the first of its statistics, which are views of its own."""

    def forward(self, input: Tensor) -> Tensor:
        first = slice(input.shape[1])
        assert self.running_mean is not None
        assert self.running_var is not None
        running = self.running_mean[first], self.running_var[first]
        affine = self.weight[first], self.bias[first]
        return F.batch_norm(input, *running, *affine, self.training, 0.1, self.eps)


class Slimmable(pl.LightningModule):
    """Four convolutions, whose width `use` sets together with the statistics."""

    def __init__(self, *, sets: bool, channels: int = 24) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            convolution = SlimConv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            return nn.Sequential(convolution, SlimBatchNorm2d(outputs), nn.ReLU())

        sizes = [
            (1, channels, 1),
            (channels, channels, 2),
            (channels, 2 * channels, 1),
            (2 * channels, 2 * channels, 2),
        ]
        self.blocks = nn.Sequential(*(block(*size) for size in sizes))
        self.head = nn.Linear(2 * channels, 10)
        self.sets = StatisticsSets(self.blocks, [f"width={width}" for width in WIDTHS]) if sets else None

    def forward(self, images: Tensor, width: float = 1.0) -> Tensor:
        for module in self.blocks.modules():
            if isinstance(module, SlimConv2d):
                module.share = width
        if self.sets is None:
            features = self.blocks(images)
        else:
            with self.sets.use(f"width={width}"):
                features = self.blocks(images)
        features = features.mean((2, 3))
        return F.linear(features, self.head.weight[:, : features.shape[1]], self.head.bias)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return torch.stack([F.cross_entropy(self(images, width), labels) for width in WIDTHS]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    options = arguments(__doc__, epochs=8)
    rows = []
    for seed in range(options.seeds):
        for sets in (False, True):
            torch.manual_seed(seed)
            training, validation = digits(seed=seed)
            module = Slimmable(sets=sets)
            fit(module, training, epochs=options.epochs)
            images, labels = images_and_labels(validation)
            for width in WIDTHS:
                found = accuracy(module, images, labels, width=width)
                rows.append({"statistics": "a set for each width" if sets else "shared", "width": width, "acc": found})
    grouped = pd.DataFrame(rows).groupby(["statistics", "width"], sort=False)["acc"]
    table = pd.DataFrame({"mean": grouped.mean(), "worst": grouped.min(), "best": grouped.max()})
    print(f"Validation accuracy in percent over {options.seeds} seeds, {options.epochs} epochs\n")
    print(
        table.unstack("statistics")
        .swaplevel(axis=1)
        .sort_index(axis=1, level=0, sort_remaining=False, ascending=False)
        .to_string(float_format="%.1f")
    )


if __name__ == "__main__":
    main()
