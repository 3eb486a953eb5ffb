"""How often BN307 calls training batches sorted that are not, and how often it finds those that are.

Run `python benchmarks/batch_order.py`. Each run draws images of 1x8x8 anew: a pixel is normal around the mean of its
class, with standard deviation 1. In the first table all pixels of an image are one number, which leaves most room to
chance. BN307 is shown the batches of two epochs, without a Trainer, since it looks at nothing else: 30 batches of 4, 8,
16 and 64 samples, of 2 and of 10 classes. It speaks if two numbers are beyond what one shuffled data set in a thousand
shows.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bn.rules.order import UNLIKELY, BatchOrder, Order, _normal_of_f

BATCHES = 30
"""Of an epoch: hardly more than the fewest that are judged."""

SIZES, CLASSES = (4, 8, 16, 64), (2, 10)

DISTANCES = (0.2, 0.5, 1.0)
"""Standard deviations of the classes' means."""

PIXELS = 64

Batches = tuple[Tensor, ...]
Epochs = tuple[Batches, Batches]


def shuffled(number: int, size: int, classes: int) -> Epochs:
    """`shuffle=True`: a new order in each epoch."""
    return torch.randperm(number).split(size), torch.randperm(number).split(size)


def shuffled_once(number: int, size: int, classes: int) -> Epochs:
    """A file that was shuffled when it was written."""
    return (torch.randperm(number).split(size),) * 2


def with_replacement(number: int, size: int, classes: int) -> Epochs:
    """`RandomSampler(replacement=True)`."""
    return torch.randint(number, (number,)).split(size), torch.randint(number, (number,)).split(size)


def in_turn(number: int, size: int, classes: int) -> Epochs:
    """Classes in turn, in one order: balanced batches."""
    return (torch.arange(number).unflatten(0, (classes, -1)).T.flatten().split(size),) * 2


def few_classes(number: int, size: int, classes: int) -> Epochs:
    """Batches of one class or two, in a new order in each epoch, as of triplets."""
    batches = torch.arange(number).split(size)
    one, other = (tuple(batches[i] for i in torch.randperm(len(batches))) for _ in range(2))
    return one, other


def few_classes_once(number: int, size: int, classes: int) -> Epochs:
    """Such batches, in one random order."""
    return (few_classes(number, size, classes)[0],) * 2


def by_class(number: int, size: int, classes: int) -> Epochs:
    """Class after class: the mistake."""
    return (torch.arange(number).split(size),) * 2


Way = Callable[[int, int, int], Epochs]

HONEST: dict[str, Way] = {
    "shuffled in each epoch": shuffled,
    "shuffled once": shuffled_once,
    "drawn with replacement": with_replacement,
    "classes in turn, in one order": in_turn,
    "batches of few classes, shuffled in each epoch": few_classes,
    "batches of few classes, shuffled once": few_classes_once,
}


class Told(NamedTuple):
    """Which of the two numbers are beyond what one shuffled data set in a thousand shows, and whether BN307 speaks."""

    spread: bool
    likeness: bool
    alarm: bool


def told(way: Way, size: int, classes: int, distance: float = 0.5, numbers: int = 1) -> Told:
    """Draw images of so many independent `numbers`, sorted by class, and show BN307 two epochs of them."""
    number = size * BATCHES
    labels = torch.arange(number) * classes // number
    means = distance * torch.randn(classes, numbers)
    images = (torch.randn(number, numbers) + means[labels]).expand(-1, PIXELS).unflatten(1, (1, 8, 8))
    look = BatchOrder()
    for batches in way(number, size, classes):
        look.begin_epoch()
        for batch in batches:
            see = look.begin_batch()
            if see is not None:
                see(images[batch])
    order = look.found()
    if order is None:
        raise RuntimeError(f"{way.__name__}: nothing was told of {BATCHES} batches")
    return Told(_spread(order) > UNLIKELY, _likeness(order) > UNLIKELY, order.is_sorted)


def _spread(order: Order) -> float:
    return _normal_of_f(order.spread, order.batches - 1, order.batches * (order.samples - 1))


def _likeness(order: Order) -> float:
    return order.likeness * math.sqrt(order.batches - 1)


def false_alarms(way: Way, runs: int) -> list[Told]:
    """Return what is told in `runs` runs of each batch size and number of classes."""
    return [told(way, size, classes) for size, classes in itertools.product(SIZES, CLASSES) for _ in range(runs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="of each order, batch size and number of classes")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("| order | spread beyond | likeness beyond | BN307 speaks |\n|---|---:|---:|---:|")
    for name, way in HONEST.items():
        found = false_alarms(way, options.runs)
        spread, likeness = (sum(each[i] for each in found) / len(found) for i in range(2))
        alarms = sum(each.alarm for each in found)
        print(f"| {name} | {spread:.2%} | {likeness:.2%} | {alarms} of {len(found)} |", flush=True)
    runs = max(options.runs // 10, 1)
    print("\n| sorted by class, means apart by | " + " | ".join(f"batches of {size}" for size in SIZES) + " |")
    print("|---|" + "---:|" * len(SIZES))
    for numbers, distance in itertools.product((1, PIXELS), DISTANCES):
        found = {
            size: [told(by_class, size, classes, distance, numbers).alarm for classes in CLASSES for _ in range(runs)]
            for size in SIZES
        }
        shares = " | ".join(f"{sum(each) / len(each):.0%}" for each in found.values())
        print(f"| {distance:g}, {'one number an image' if numbers == 1 else 'each pixel'} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
