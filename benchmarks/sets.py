"""What a step with two sets of statistics costs, beside two forwards of the same network without sets.

A step is two forwards, each of a batch of its own, one backward and SGD, of a ResNet with 52 batch norms, one thread.
Variants are timed in turn; printed are the medians of the rounds' ratios to the same layers without sets, and of these
over several processes. With 2 images of 3x32x32 the host is the bottleneck, as it is on a GPU. What Python does in a
step beyond that without sets is exact, and the same on every machine.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from multiprocessing import get_context

import torch
from interpreted import count_python
from resnet import resnet50
from torch import Tensor, nn
from turns import ratios

from lightning_bn import StatisticsSets, Window, convert_batch_norm

LAYERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch's layers": lambda model: model,
    "Window(20)": lambda model: convert_batch_norm(model, Window(20)),
}


def training_step(model: nn.Module, samples: int, *, sets: bool, affine: bool = False) -> Callable[[], None]:
    """Return a step of two batches; without sets both go into the statistics that there are."""
    owner = StatisticsSets(model, ["one", "other"], affine=affine) if sets else None
    parameters = [*model.parameters(), *(owner.parameters() if owner is not None else ())]
    optimizer = torch.optim.SGD(parameters, lr=1e-4)
    first, second = torch.randn(samples, 3, 32, 32), torch.randn(samples, 3, 32, 32)

    def loss(batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    def step() -> None:
        optimizer.zero_grad()
        total = loss(first)
        if owner is None:
            total = total + loss(second)
        else:
            with owner.use("other"):
                total = total + loss(second)
        total.backward()
        optimizer.step()

    return step


def steps_of(convert: Callable[[nn.Module], nn.Module], samples: int) -> dict[str, Callable[[], None]]:
    variants = {
        "no sets": (False, False),
        "no sets again": (False, False),
        "two sets": (True, False),
        "affine=True": (True, True),
    }
    return {
        what: training_step(convert(resnet50(4)), samples, sets=sets, affine=affine)
        for what, (sets, affine) in variants.items()
    }


def python_of(convert: Callable[[nn.Module], nn.Module]) -> dict[str, tuple[int, int]]:
    """Return the Python functions and bytecodes of a step."""
    steps = steps_of(convert, 2)
    for step in steps.values():
        step()  # a first step sets things up
    return {what: count_python(step) for what, step in steps.items() if what != "no sets again"}


def measure(rounds: int) -> dict[tuple[int, str], list[float]]:
    """Return the ratios by images a batch and layers, as one process measures them."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = {}
    for samples, repeat in ((2, 5), (32, 1)):
        for name, convert in LAYERS.items():
            steps = steps_of(convert, samples)
            found[samples, name] = list(ratios(steps, "cpu", rounds, repeat).values())[1:]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--processes", type=int, default=3, help="0: no times, what Python does alone")
    options = parser.parse_args()
    print(f"{'layers':18}{'step':12}{'Python functions':>18}{'bytecodes':>12}")
    for name, convert in LAYERS.items():
        for what, (functions, bytecodes) in python_of(convert).items():
            print(f"{name:18}{what:12}{functions:18,d}{bytecodes:12,d}")
    if not options.processes:
        return
    # Where its tensors happen to lie makes a model a few percent faster or slower for as long as a process lives.
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        tables = [pool.apply(measure, (options.rounds,)) for _ in range(options.processes)]
    print(f"\n{'images a batch':16}{'layers':18}{'no sets again':>15}{'two sets':>10}{'affine=True':>13}")
    for samples, name in tables[0]:
        each = zip(*(table[samples, name] for table in tables), strict=True)
        again, two, affine = map(statistics.median, each)
        print(f"{samples:<16}{name:18}{again:15.3f}{two:10.3f}{affine:13.3f}")


if __name__ == "__main__":
    main()
