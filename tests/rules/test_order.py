"""BN307's two numbers: what they are for shuffled data, by theory; and for data in many orders."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_bn.rules.order import LEAST_BATCHES, MOST_BATCHES, BatchOrder, Order, _normal_of_f

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))

from batch_order import HONEST, by_class, false_alarms

SIZE, BATCHES = 16, 30
NUMBER = SIZE * BATCHES


def told(data: Tensor, orders: Sequence[Tensor], size: int = SIZE) -> Order | None:
    """Show the batches of each epoch, whose samples come in that epoch's order."""
    look = BatchOrder()
    for order in orders:
        look.begin_epoch()
        for batch in data[order].split(size):
            if (see := look.begin_batch()) is not None:
                see(batch)
    return look.found()


def in_order(number: int = NUMBER) -> list[Tensor]:
    return [torch.arange(number)] * 2


def shuffled(number: int = NUMBER) -> list[Tensor]:
    return [torch.randperm(number), torch.randperm(number)]


def classes(number: int = NUMBER, classes: int = 6) -> Tensor:
    """Return images that are brighter by class, sorted by it."""
    labels = torch.arange(classes).repeat_interleave(number // classes)
    return torch.randn(len(labels), 3, 4, 4) + labels.reshape(-1, 1, 1, 1) / 2


def test_both_numbers_by_loops() -> None:
    """Of one feature: n times the variance of batch means, over the mean variance in batches; and a correlation."""
    torch.manual_seed(0)
    data, order = torch.randn(NUMBER, 1).cumsum(0), torch.randperm(NUMBER)
    one, other = (each.numpy().reshape(BATCHES, SIZE).astype(np.float64) for each in (data[:, 0], data[order, 0]))
    spread = SIZE * np.var([batch.mean() for batch in one], ddof=1) / np.mean([np.var(batch, ddof=1) for batch in one])
    pairs = [(one[i].mean() - one.mean(), other[i + 1].mean() - other.mean()) for i in range(BATCHES - 1)]
    lengths = math.sqrt(sum(a * a for a, _ in pairs)) * math.sqrt(sum(b * b for _, b in pairs))
    found = told(data, [torch.arange(NUMBER), order])
    assert found is not None
    assert found.spread == pytest.approx(spread, rel=1e-4)
    assert found.likeness == pytest.approx(sum(a * b for a, b in pairs) / lengths, rel=1e-4)
    assert (found.batches, found.samples) == (BATCHES, SIZE)


@pytest.mark.parametrize("same", [True, False], ids=["one order for both epochs", "an order for each"])
@pytest.mark.parametrize("features", [1, 3])
def test_shuffled_data_are_what_theory_says(features: int, same: bool) -> None:
    """Over 200 shuffles, of skewed data and of features that are all the same: a mean near 1 and 0, not more beyond
    the 5 % points than 5 % and three standard errors, and no alarm."""
    torch.manual_seed(0)
    beyond_spread = beyond_likeness = 0
    spreads, likenesses = [], []
    for _ in range(200):
        data = torch.randn(NUMBER, 1).exp().expand(-1, features)
        orders = shuffled()
        found = told(data, orders[:1] * 2 if same else orders)
        assert found is not None
        assert not found.is_sorted
        spreads.append(found.spread)
        likenesses.append(found.likeness)
        beyond_spread += _normal_of_f(found.spread, BATCHES - 1, BATCHES * (SIZE - 1)) > 1.645
        beyond_likeness += found.likeness * math.sqrt(BATCHES - 1) > 1.645
    most = 200 * 0.05 + 3 * math.sqrt(200 * 0.05 * 0.95)
    assert beyond_spread <= most
    assert beyond_likeness <= most
    assert np.mean(spreads) == pytest.approx(1, abs=4 * math.sqrt(2 / (BATCHES - 1) / 200))
    assert np.mean(likenesses) == pytest.approx(-same / BATCHES, abs=4 / math.sqrt((BATCHES - 1) * 200))


@pytest.mark.parametrize("order", HONEST)
def test_false_alarms_of_honest_orders(order: str) -> None:
    """Of 120 runs, with batches of 4 to 64 and 2 to 10 classes: not more alarms than one in a thousand and three
    standard errors."""
    torch.manual_seed(0)
    alarms = [each.alarm for each in false_alarms(HONEST[order], 15)]
    assert sum(alarms) <= 120 * 0.001 + 3 * math.sqrt(120 * 0.001)
    assert len(alarms) == 120


def test_the_measure_of_false_alarms_sees_alarms() -> None:
    """Of the same images sorted by class BN307 speaks."""
    torch.manual_seed(0)
    assert any(each.alarm for each in false_alarms(by_class, 2))


@pytest.mark.parametrize(("above", "below"), [(23, 24), (29, 450), (63, 2000)])
def test_normal_of_f(above: int, below: int) -> None:
    """By a simulation of F: as often beyond 3.09 as a normal variable, within four standard errors and a tenth."""
    draw = np.random.default_rng(0)
    f = draw.f(above, below, 100_000)
    beyond = np.mean([_normal_of_f(float(value), above, below) > 3.09 for value in f])
    assert beyond == pytest.approx(0.001, abs=0.0001 + 4 * math.sqrt(0.001 / 100_000))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_sorted_data_are_told(seed: int, dtype: torch.dtype) -> None:
    """By class, and only where they come in that order."""
    torch.manual_seed(seed)
    data = (classes() * 20 + 100).to(dtype)
    found = told(data, in_order())
    assert found is not None
    assert found.is_sorted
    assert found.spread > 10
    assert not told(data, shuffled()).is_sorted
    assert not told(data, [torch.arange(NUMBER), torch.randperm(NUMBER)]).is_sorted


def test_batches_of_few_classes_at_random_are_not_sorted() -> None:
    """As of triplets or of few-shot episodes: a large spread, and no likeness of neighbours."""
    torch.manual_seed(0)
    data = classes()
    groups = torch.arange(NUMBER).split(SIZE)
    orders = [torch.cat([groups[i] for i in torch.randperm(BATCHES)]) for _ in range(2)]
    for each in (orders, orders[:1] * 2):
        found = told(data, each)
        assert found is not None
        assert found.spread > 10
        assert not found.is_sorted


@pytest.mark.parametrize("batches", [MOST_BATCHES, MOST_BATCHES + 1, 5 * MOST_BATCHES])
def test_long_epochs_are_looked_at_here_and_there(batches: int) -> None:
    """At most so many batches are kept, and a slow drift over the epoch is seen by them."""
    torch.manual_seed(0)
    found = told(classes(batches * 4), in_order(batches * 4 // 6 * 6), size=4)
    assert found is not None
    assert found.is_sorted
    assert LEAST_BATCHES <= found.batches <= MOST_BATCHES


def test_a_ragged_last_batch_and_features_that_stand_still() -> None:
    """A last batch of one sample is left out; a border that is always black says nothing, and spoils nothing."""
    torch.manual_seed(0)
    data = torch.nn.functional.pad(classes(), (2, 2, 2, 2))
    whole, ragged = told(data, in_order()), told(torch.cat((data, data[:1])), in_order(NUMBER + 1))
    assert whole == ragged
    assert whole is not None
    assert whole.is_sorted


@pytest.mark.parametrize(
    "data",
    [torch.arange(NUMBER).reshape(-1, 1), torch.arange(NUMBER).float(), torch.full((NUMBER, 2), float("nan"))],
    ids=["words", "numbers", "NaN"],
)
def test_what_tells_nothing(data: Tensor) -> None:
    """Words, single numbers and what is not finite give no alarm."""
    found = told(data, in_order())
    assert found is None or not found.is_sorted


def test_one_epoch_or_few_batches_tell_nothing() -> None:
    """Two epochs of at least so many batches."""
    data = classes()
    assert told(data, in_order()[:1]) is None
    assert told(data, in_order((LEAST_BATCHES - 1) * SIZE)) is None
    assert told(data, in_order(LEAST_BATCHES * SIZE)) is not None
