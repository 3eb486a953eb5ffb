"""How accurate the statistics of 1,024 ranks are, merged in one sum: simulated in one process, since the arithmetic is
the same.

Each rank has the moments of its own batch, in float64. They are merged by Chan's formula in the order of the ranks, and
by adding up sums that are shifted by a mean (`lightning_bn.ranks.merging.ShiftedSums`), in the order of a ring and in
that of a tree. Truth is the same merge in rational numbers. Printed is the largest relative error of the merged
variance over channels, by how many standard deviations the shift is off; and how far the two orders are apart.
"""

from __future__ import annotations

import argparse
from fractions import Fraction
from functools import reduce

import torch
from torch import Tensor

from lightning_bn.moments import Moments
from lightning_bn.ranks.merging import ShiftedSums

CHANNELS = 16
SPREAD = 0.1  # of the ranks' means, in standard deviations


def batches(ranks: int, mean: float) -> list[Moments]:
    """The moments of each rank's batch: 16 to 32 images of 64 pixels, standard deviation 1."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(16, 33, (ranks,), generator=generator) * 64
    found = []
    for size in sizes.tolist():
        offset = SPREAD * torch.randn(CHANNELS, generator=generator, dtype=torch.float64)
        variance = 1 + 0.1 * torch.randn(CHANNELS, generator=generator, dtype=torch.float64)
        found.append(Moments(torch.tensor(float(size), dtype=torch.float64), mean + offset, variance * size))
    return found


def exact(parts: list[Moments]) -> list[Fraction]:
    """The variance of each channel (biased), in rational numbers."""
    variances = []
    for channel in range(CHANNELS):
        counts = [Fraction(int(part.count)) for part in parts]
        means = [Fraction(part.mean[channel].item()) for part in parts]
        count = sum(counts, Fraction())
        centre = sum((n * m for n, m in zip(counts, means, strict=True)), Fraction()) / count
        within = sum((Fraction(part.m2[channel].item()) for part in parts), Fraction())
        between = sum((n * (m - centre) ** 2 for n, m in zip(counts, means, strict=True)), Fraction())
        variances.append((within + between) / count)
    return variances


def shifted(parts: list[Moments], shift: Tensor, *, tree: bool) -> Tensor:
    """The merged variance by one sum over the ranks."""
    sums = [
        ShiftedSums.of(part.count.reshape(1), part.count.expand(CHANNELS), part.mean, part.m2, shift) for part in parts
    ]
    while tree and len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    count, first, second = reduce(torch.add, sums).split([1, CHANNELS, CHANNELS])
    return ShiftedSums.moments(count.expand(CHANNELS), first, second, shift).variance(unbiased=False)


def error(found: Tensor, truth: list[Fraction]) -> float:
    pairs = zip(found.tolist(), truth, strict=True)
    return float(max(abs((Fraction(value) - true) / true) for value, true in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024, help="a power of two")
    options = parser.parse_args()
    mean = 1000.0
    parts = batches(options.ranks, mean)
    truth = exact(parts)
    chan = reduce(Moments.merge, parts).variance(unbiased=False)
    print("| merged by | shift off by, std | error, ring | error, tree |")
    print("|---|---:|---:|---:|")
    print(f"| Chan's formula | - | {error(chan, truth):.0e} | - |")
    for off in (0.0, 0.1, 1.0, 10.0, 100.0, 1000.0):
        shift = torch.full((CHANNELS,), mean - off, dtype=torch.float64)
        ring, tree = (error(shifted(parts, shift, tree=each), truth) for each in (False, True))
        print(f"| one shifted sum | {off:g} | {ring:.0e} | {tree:.0e} |")


if __name__ == "__main__":
    main()
