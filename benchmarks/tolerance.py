"""What `recalibrate(tolerance=...)` saves and costs: batches that are read, and accuracy on images held out.

Networks of five batch norms are trained on digits with several seeds, then recalibrated from the same training data, in
batches of four or of 32, with all batches and with fewer. The cost is the accuracy with all batches less the accuracy
with those that the tolerance took, in points.

    python benchmarks/tolerance.py [SEEDS]
"""

from __future__ import annotations

import copy
import sys
from itertools import pairwise
from statistics import mean

import torch
import torch.nn.functional as F
from split_digits import HELD_OUT, TRAIN
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import recalibrate

TOLERANCES = (None, 0.002, 0.005, 0.01, 0.1)


def trained() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inside, outside in pairwise((1, 8, 8, 16, 16, 16)):
        layers += [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for images, labels in DataLoader(TRAIN, 32, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model


def accuracy(model: nn.Module) -> float:
    images, labels = HELD_OUT.tensors
    with torch.no_grad():
        return (model.eval()(images).argmax(1) == labels).double().mean().item()


def recalibrated(model: nn.Module, batches: list[Tensor], tolerance: float | None) -> tuple[int, float]:
    """Return how many batches were read, and the accuracy in percent."""
    mended = copy.deepcopy(model)
    report = recalibrate(mended, batches, tolerance=tolerance, progress=False)
    return report.batches, 100 * accuracy(mended)


def main(seeds: int) -> None:
    torch.set_num_threads(1)
    models = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        models.append(trained())
    print("| `tolerance=` | batch size | batches read | accuracy, mean | cost, mean | cost, worst |")
    print("|---|---:|---:|---:|---:|---:|")
    for size in (4, 32):
        torch.manual_seed(0)
        batches = [images for images, _ in DataLoader(TRAIN, size, shuffle=True, drop_last=True)]
        exact = [recalibrated(model, batches, None)[1] for model in models]
        for tolerance in TOLERANCES:
            found = [recalibrated(model, batches, tolerance) for model in models]
            costs = [whole - right for whole, (_, right) in zip(exact, found, strict=True)]
            print(
                f"| {tolerance} | {size} | {mean(count for count, _ in found):.0f} of {len(batches)} "
                f"| {mean(right for _, right in found):.1f} % | {mean(costs):+.1f} | {max(costs):+.1f} |"
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
