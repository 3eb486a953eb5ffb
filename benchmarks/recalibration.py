"""What recalibration costs and how right it is, beside bare loops over the data, fvcore's `update_bn_stats` and torch's
`update_bn`.

All variants are timed in turn, round after round, in this one run; printed are medians of the rounds' ratios to the
bare train-mode loop. Accuracy is that of the statistics against one float64 batch of all the data, class-sorted as it
comes: worst channel of the first batch norm and of all. Peak memory is what a process of its own adds to its resident
set for one pass (Linux alone). A second table has short passes over small images, where what is the same for any data
counts most; it gives the process's own time. A third one has four times the layers. The last two tables show what
`tolerance` saves on trained networks; the smaller the network, the more of the time goes into what is the same for any
data.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import resnet
import torch
import torch.nn.functional as F
from fvcore.nn.precise_bn import update_bn_stats
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from tqdm import tqdm

from lightning_bn import recalibrate

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from digits import ConvNet, digits

Batches = list[Tensor]
Way = Callable[[nn.Module, Batches], object]


def resnet20() -> nn.Sequential:
    """ResNet-20 with 1x1 convolutions where the width changes; the same weights each time."""
    torch.manual_seed(0)
    return resnet.resnet20(shortcut=resnet.convolution)


def pictures(count: int) -> Tensor:
    """The first `count` digits, enlarged to 3x32x32 and sorted by class."""
    data = load_digits()
    images = torch.tensor(data.images[:count], dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    return images[torch.tensor(data.target[:count]).argsort(stable=True)].contiguous()


@torch.no_grad()
def bare(model: nn.Module, batches: Batches) -> None:
    for batch in batches:
        model(batch)


def bare_eval(model: nn.Module, batches: Batches) -> None:
    bare(model.eval(), batches)


def torch_without_grad(model: nn.Module, batches: Batches) -> None:
    with torch.no_grad():
        update_bn(batches, model)


BASE = "bare train-mode loop, no_grad"
WAYS: dict[str, Way] = {
    BASE: bare,
    "bare eval loop, no_grad": bare_eval,
    "fvcore update_bn_stats": lambda model, batches: update_bn_stats(model, batches, len(batches)),
    "torch update_bn": lambda model, batches: update_bn(batches, model),
    "torch update_bn, no_grad": torch_without_grad,
    "recalibrate": lambda model, batches: recalibrate(model, batches, progress=False),
    "recalibrate, exact": lambda model, batches: recalibrate(model, batches, exact=True, progress=False),
}


def ratios(
    ways: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Return each way's median over the rounds of its time to the first's in the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in tqdm(range(rounds + 1), unit="round", leave=False):
        for name, way in ways.items():
            start = clock()
            way()
            if number:  # the first round warms up
                seconds[name].append(clock() - start)
    (first, *_) = seconds.values()
    return {name: statistics.median(a / b for a, b in zip(each, first, strict=True)) for name, each in seconds.items()}


def norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@torch.no_grad()
def full_batch_variances(model: nn.Module, data: Tensor) -> list[Tensor]:
    """Unbiased variances, in float64, of what each layer gets from all the data in one batch at inference."""
    twin = copy.deepcopy(model).double().eval()

    def set_to_input(layer: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        layer.running_var, layer.running_mean = torch.var_mean(inputs[0], (0, 2, 3))

    for layer in norms(twin):
        layer.register_forward_pre_hook(set_to_input)
    twin(data.double())
    return [layer.running_var for layer in norms(twin)]


def variance_errors(model: nn.Module, truth: Iterable[Tensor]) -> list[float]:
    """The relative error of the worst channel, layer by layer."""
    return [
        (layer.running_var.double() / var - 1).abs().max().item()
        for layer, var in zip(norms(model), truth, strict=True)
    ]


def peak_megabytes(name: str, images: int, batch_size: int, threads: int) -> float:
    torch.set_num_threads(threads)
    model, batches = resnet20(), list(pictures(images).split(batch_size))
    bare_eval(model, batches[:1])  # what the first call of a convolution allocates for good
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = resident_megabytes("VmRSS")
    WAYS[name](model.train(), batches)
    return resident_megabytes("VmHWM") - before


def resident_megabytes(which: str) -> float:
    """Return VmRSS, the resident set, or VmHWM, its peak, from Linux's /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|---|" + "---:|" * (len(header) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def compare_ways(images: int, batch_size: int, rounds: int) -> None:
    data = pictures(images)
    batches = list(data.split(batch_size))
    truth = full_batch_variances(resnet20(), data)
    models = {name: resnet20() for name in WAYS}
    times = ratios(
        {name: lambda name=name, way=way: way(models[name].train(), batches) for name, way in WAYS.items()}, rounds
    )
    rows = []
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in WAYS:
            memory = (
                f"{pool.apply(peak_megabytes, (name, images, batch_size, torch.get_num_threads())):.0f}"
                if sys.platform == "linux"
                else ""
            )
            errors = variance_errors(models[name], truth) if not name.startswith("bare") else []
            accuracy = [f"{errors[0]:.1e}", f"{max(errors):.1e}"] if errors else ["", ""]
            rows.append([name, f"{times[name]:.3f}", *accuracy, memory])
    print(
        f"\nResNet-20, {len(data)} images of 3x32x32 in batches of {batch_size}, {rounds} rounds, "
        f"{torch.get_num_threads()} threads\n"
    )
    print_table(["", "time", "variance error, first layer", "worst layer", "peak MB"], rows)


def compare_short_passes(rounds: int) -> None:
    fvcore, ours = "fvcore update_bn_stats", "recalibrate"
    rows = []
    for title, network in (
        ("ResNet-20", resnet20),
        ("ResNet with 52 batch norms, width 4", partial(resnet.resnet50, 4)),
    ):
        for number in (1, 3, 6, 12):
            batches = [torch.randn(4, 3, 64, 64) for _ in range(number)]
            models = {name: network().train() for name in (fvcore, ours)}
            ways = {name: partial(WAYS[name], models[name], batches) for name in models}
            rows.append([title, str(number), f"{ratios(ways, rounds, time.process_time)[ours]:.2f}", "<= 1.2"])
    print(f"\nShort passes, batches of 4x3x64x64, {rounds} rounds, {torch.get_num_threads()} threads\n")
    print_table(["", "batches", "recalibrate's time of fvcore's", "asked"], rows)


def deep(layers: int) -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.ReLU()) for _ in range(layers)]
    return nn.Sequential(*blocks)


def compare_growth(rounds: int, few: int = 400, many: int = 1600) -> None:
    batches, names = list(torch.randn(2, 8, 10)), ("fvcore update_bn_stats", "recalibrate", "recalibrate, exact")
    models = {layers: deep(layers) for layers in (few, many)}
    rows = []
    for name in names:
        ways = {str(layers): lambda m=model, w=WAYS[name]: w(m.train(), batches) for layers, model in models.items()}
        rows.append([name, f"{ratios(ways, rounds, time.process_time)[str(many)]:.2f}", f"{many / few:.0f}"])
    print(f"\n{many} layers of 10 channels, two batches of 8, {rounds} rounds\n")
    print_table(["", f"time, of that of {few} layers", "times as many layers"], rows)


def compare_tolerance(title: str, make: Callable[[], nn.Module], enlarge: bool, seeds: int, rounds: int) -> None:
    rows = []
    for seed in range(seeds):
        training, validation = (enlarged(loader) if enlarge else loader for loader in digits(32, seed=seed))
        torch.manual_seed(seed)
        model = train(make(), training)
        found: dict[str, float] = {}
        for name, way in TOLERANCE.items():
            way(model, training)
            found[name] = accuracy(model, validation)
        ways = {name: partial(way, model, training) for name, way in TOLERANCE.items()}
        report = ways["recalibrate(tolerance=0.1)"]()
        speed = ratios(ways, rounds)["torch update_bn"]
        rows.append(
            [
                str(seed),
                f"{report.batches} of {len(training)}",
                f"{speed:.1f}",
                *(f"{value:.2f}" for value in found.values()),
            ]
        )
    rows.append(["mean", "", *(f"{statistics.mean(float(row[place]) for row in rows):.2f}" for place in (2, 3, 4))])
    print(f"\n{title}, trained for 2 epochs on 1397 digits, batches of 32, median of {rounds} rounds\n")
    print_table(
        ["seed", "batches read", "times faster than update_bn", "accuracy, tolerance=0.1", "accuracy, update_bn"], rows
    )


TOLERANCE: dict[str, Callable[..., Any]] = {
    "recalibrate(tolerance=0.1)": lambda model, training: recalibrate(model, training, tolerance=0.1, progress=False),
    "torch update_bn": lambda model, training: update_bn(training, model),
}


def enlarged(loader: DataLoader[tuple[Tensor, ...]]) -> DataLoader[tuple[Tensor, ...]]:
    """The same loader over the same images as 3x32x32."""
    images, labels = loader.dataset.tensors
    images = F.interpolate(images, size=(32, 32), mode="bilinear").repeat(1, 3, 1, 1)
    shuffle = isinstance(loader.sampler, RandomSampler)
    return DataLoader(
        TensorDataset(images, labels),
        loader.batch_size,
        shuffle=shuffle,
        drop_last=loader.drop_last,
        generator=loader.generator,
    )


def train(model: nn.Module, training: Iterable[tuple[Tensor, Tensor]], epochs: int = 2) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(epochs):
        for images, labels in training:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, validation: Iterable[tuple[Tensor, Tensor]]) -> float:
    model.eval()
    right = torch.cat([(model(images).argmax(1) == labels).double() for images, labels in validation])
    model.train()
    return 100 * right.mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=516)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    compare_ways(options.images, options.batch_size, options.rounds)
    compare_short_passes(3 * options.rounds)
    compare_growth(options.rounds)
    compare_tolerance("ResNet-20 on 3x32x32", resnet20, True, options.seeds, options.rounds)
    compare_tolerance("The examples' ConvNet on 1x8x8", ConvNet, False, options.seeds, options.rounds)


if __name__ == "__main__":
    main()
