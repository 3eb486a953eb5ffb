"""The effect by which statistics are judged, against loops in float64 that share no code with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_bn.rules.fit import BatchSums, Effect, Running, batch_sums, effect

EPS = 1e-5


def naive(batches: list[Tensor], running: Running) -> tuple[float, float]:
    """Return the effect and its lower bound, squared, as they are defined: image by image, channel by channel."""
    images = sum(len(batch) for batch in batches)
    total, total_error, total_weight = 0.0, 0.0, 0.0
    for channel in range(batches[0].shape[1]):
        values, a, q = [], 0.0, 0.0
        for batch in batches:
            each = [image[channel].double().flatten().tolist() for image in batch]
            flat = [value for image in each for value in image]
            mean = sum(flat) / len(flat)
            values += flat
            means = [sum(image) / len(image) for image in each]
            seconds = [sum((value - mean) ** 2 for value in image) / len(image) for image in each]
            a += sum((one - sum(means) / len(means)) ** 2 for one in means)
            q += sum((one - sum(seconds) / len(seconds)) ** 2 for one in seconds)
        a, q = a / (images - len(batches)), q / (images - len(batches))
        mu = sum(values) / len(values)
        v = sum((value - mu) ** 2 for value in values) / (len(values) - 1)
        r, s2, g = (float(each[channel]) for each in (running.mean, running.var, running.weight))
        if max(s2, v) <= 10 * EPS:
            continue
        chance = 1 / images + running.noise / running.images
        d1 = (mu - r) ** 2 / math.sqrt((s2 + EPS) * (v + EPS))
        e1 = a * chance / math.sqrt((s2 + EPS) * (v + EPS))
        d2 = math.log((v + EPS) / (s2 + a * (1 / running.images - 1 / images) + EPS)) ** 2 / 4
        e2 = q * chance / (v + EPS) ** 2 / 4
        total += g**2 * (d1 - e1 + d2 - e2)
        total_error += g**2 * (math.sqrt(4 * d1 * e1 + 2 * e1**2) + math.sqrt(4 * d2 * e2 + 2 * e2**2))
        total_weight += g**2
    return total / total_weight, (total - 2 * total_error) / total_weight


def measured(batches: list[Tensor], running: Running) -> Effect | None:
    return effect(
        [
            BatchSums(len(batch), batch[0, 0].numel(), *(each.double() for each in batch_sums(batch)))
            for batch in batches
        ],
        running,
    )


def inputs(*shape: int, seed: int = 0, batches: int = 4, shift: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(1, shape[1], *[1] * (len(shape) - 2), generator=generator) + 0.1
    of_images = torch.randn(batches, shape[0], shape[1], *[1] * (len(shape) - 2), generator=generator)
    noise = torch.randn(batches, *shape, generator=generator)
    return list((noise + of_images) * scale + shift)


@pytest.mark.parametrize("shape", [(8, 3, 5, 5), (6, 4), (5, 3, 7), (4, 2, 2, 3, 2)])
@pytest.mark.parametrize("noise", [0.0, 0.1 / 1.9])
@pytest.mark.parametrize("far", [0.0, 2.0])
def test_effect_is_its_definition(shape: tuple[int, ...], noise: float, far: float) -> None:
    """For images, sequences, volumes and vectors, with and without the noise of an average, near and far."""
    batches = inputs(*shape)
    generator = torch.Generator().manual_seed(1)
    channels = shape[1]
    running = Running(
        torch.ones(channels) + far * torch.randn(channels, generator=generator),
        torch.rand(channels, generator=generator) * (1 + far) + 0.2,
        torch.randn(channels, generator=generator),
        EPS,
        16,
        noise,
    )
    squared, lower = naive(batches, running)
    found = measured(batches, running)
    assert found is not None
    assert found.size == pytest.approx(math.sqrt(max(squared, 0)), rel=1e-4, abs=1e-4)
    assert found.lower == pytest.approx(math.sqrt(max(lower, 0)), rel=1e-4, abs=1e-3)


def test_effect_is_in_deviations_of_the_output() -> None:
    """A mean that is off by d deviations, at the right variance, is an effect of d; a variance off by a factor of f is
    one of ``log(f) / 2``."""
    batches = [torch.randn(500, 2, 6, 6, generator=torch.Generator().manual_seed(each)) for each in range(4)]
    right = Running(torch.zeros(2), torch.ones(2), torch.ones(2), EPS, 500, 0.0)
    for off, expected in (
        (Running(torch.full((2,), 0.7), torch.ones(2), torch.ones(2), EPS, 500, 0.0), 0.7),
        (Running(torch.zeros(2), torch.full((2,), 9.0), torch.ones(2), EPS, 500, 0.0), math.log(9) / 2),
    ):
        found = measured(batches, off)
        assert found is not None
        assert found.size == pytest.approx(expected, rel=0.02)
        assert 0.9 * expected < found.lower < found.size
    found = measured(batches, right)
    assert found is not None
    assert found.size < 0.02
    assert not found.beyond


def test_chance_is_no_effect() -> None:
    """Statistics of one batch of images that vary as a whole are far from those of others by chance; its lower bound is
    beyond the limit in none of 200 draws, and the effect is 0 in the mean of its square."""
    beyond, squares = 0, []
    for seed in range(200):
        train, *evaluation = inputs(8, 4, 3, 3, seed=seed, batches=5, shift=0.0)
        var, mean = torch.var_mean(train, (0, 2, 3))
        found = measured(evaluation, Running(mean, var, torch.ones(4), EPS, 8, 1.0))
        assert found is not None
        beyond += found.beyond
        squares.append(found.size)
    assert beyond == 0
    assert sum(squares) / len(squares) < 0.35


def test_dead_channels_and_weights_of_zero_count_for_nothing() -> None:
    """A channel that is constant in training and evaluation, and one that the affine weight switches off, are left
    out; without any other there is no effect."""
    batches = [torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    for batch in batches:
        batch[:, 1] = 1e-4
    weight = torch.tensor([1.0, 1.0, 0.0])
    running = Running(torch.tensor([0.0, 5.0, 7.0]), torch.tensor([1.0, 0.0, 1.0]), weight, EPS, 8, 0.0)
    found = measured(batches, running)
    assert found is not None
    assert found.size < 0.2
    off = measured(batches, Running(running.mean, running.var, torch.zeros(3), EPS, 8, 0.0))
    assert off == Effect(0.0, 0.0, 16)


@pytest.mark.parametrize("sizes", [[3], [1, 1, 1, 1], [2]])
def test_too_few_images_are_not_judged(sizes: list[int]) -> None:
    """Three images, or batches of one image each, tell nothing of how images vary."""
    batches = [torch.randn(size, 2, 4, 4) for size in sizes]
    assert measured(batches, Running(torch.zeros(2), torch.ones(2), torch.ones(2), EPS, 8, 0.0)) is None


def test_parts_of_the_same_data_pool_alike() -> None:
    """The pooled mean and variance do not depend on how the images are cut into batches; only A and Q do, a little."""
    data = torch.cat(inputs(8, 3, 5, 5))
    running = Running(torch.zeros(3), torch.ones(3), torch.ones(3), EPS, 16, 0.05)
    whole, parts = measured([data], running), measured(list(data.split(8)), running)
    assert whole is not None
    assert parts is not None
    assert whole.size == pytest.approx(parts.size, rel=0.02)
