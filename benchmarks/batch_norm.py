"""What the averages cost: forward + backward beside torch's BatchNorm2d, for one layer and for a whole training step.

All variants of a row are timed in turn, round after round, in this one run; printed are medians of the rounds' ratios
to torch's layer.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from resnet import resnet18
from torch import nn
from tqdm import tqdm

from lightning_bn import Averaging, BatchNorm2d, Cumulative, Exponential, Window, convert_batch_norm

AVERAGES: dict[str, Averaging] = {
    "Exponential(0.1)": Exponential(0.1),
    "Exponential(0.1, debias)": Exponential(0.1, debias=True),
    "Exponential(0.1, pooled)": Exponential(0.1, pooled=True),
    "Cumulative()": Cumulative(),
    "Window(10)": Window(10),
    "Window(100)": Window(100),
    "Window(1000)": Window(1000),
    "Window(100, pooled)": Window(100, pooled=True),
}
SHAPES = [(64, 16, 32, 32), (64, 64, 16, 16), (64, 256, 8, 8), (32, 512, 4, 4)]


def layer_step(layer: nn.Module, shape: tuple[int, ...]) -> Callable[[], None]:
    batch, gradient = torch.randn(shape, requires_grad=True), torch.randn(shape)

    def step() -> None:
        layer(batch).backward(gradient)

    return step


def model_step(model: nn.Module, batch_size: int) -> Callable[[], None]:
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def ratios(steps: dict[str, Callable[[], None]], rounds: int, repeat: int, bar: tqdm[None]) -> dict[str, float]:
    """Return each variant's median over the rounds of its time to the first's in the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(repeat):
                step()
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - start) / repeat)
            bar.update()
    (first, *_) = seconds.values()
    return {name: statistics.median(a / b for a, b in zip(each, first, strict=True)) for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--batch-size", type=int, default=128, help="of the ResNet-18 step; 128 as in He et al. (2016), section 4.2"
    )
    parser.add_argument("--layers-only", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)

    rows: list[tuple[str, dict[str, float]]] = []
    variants = 2 + len(AVERAGES)
    with tqdm(total=variants * (options.rounds + 1) * (len(SHAPES) + (not options.layers_only)), unit="round") as bar:
        for shape in SHAPES:
            layers = {"torch": nn.BatchNorm2d(shape[1]), "no averaging": BatchNorm2d(shape[1])}
            layers |= {name: BatchNorm2d(shape[1], averaging=averaging) for name, averaging in AVERAGES.items()}
            steps = {name: layer_step(layer, shape) for name, layer in layers.items()}
            rows.append(("x".join(map(str, shape)), ratios(steps, options.rounds, 10, bar)))
        if not options.layers_only:
            plain = resnet18()
            models = {"torch": plain, "no averaging": convert_batch_norm(copy.deepcopy(plain))}
            models |= {
                name: convert_batch_norm(copy.deepcopy(plain), averaging) for name, averaging in AVERAGES.items()
            }
            steps = {name: model_step(model, options.batch_size) for name, model in models.items()}
            rows.append(("ResNet-18 step", ratios(steps, options.rounds, 1, bar)))

    print(
        f"\ntime relative to torch.nn.BatchNorm2d, median of {options.rounds} interleaved rounds, "
        f"{torch.get_num_threads()} threads\n"
    )
    print("| averaging | " + " | ".join(title for title, _ in rows) + " |")
    print("|---|" + "---:|" * len(rows))
    for name in rows[0][1]:
        print(
            f"| {name} | "
            + " | ".join(f"{row[name]:.2f}" if "step" not in title else f"{row[name]:.3f}" for title, row in rows)
            + " |"
        )
    last = rows[-1][1]
    print(f"\nWindow(1000) / Window(10), {rows[-1][0]}: {last['Window(1000)'] / last['Window(10)']:.3f}")


if __name__ == "__main__":
    main()
