"""What a layer saw: the same however the data is cut, ordered, or spread over ranks."""

from __future__ import annotations

import math

import numpy as np
import oracles
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bn.recalibration.tally import BatchMoments, Summary, Tally


def row(data: torch.Tensor) -> BatchMoments:
    values = data.double()
    return BatchMoments(len(data), len(data), values.mean(0), values.var(0, correction=0))


CPU = torch.device("cpu")


def tally(batches: list[torch.Tensor], pending: int | None = 3) -> Tally:
    """Of a layer of two channels, beside one of a single channel that sees the first of them and one that sees
    nothing."""
    found = Tally([1, 2, 3], CPU, pending)
    for number, batch in enumerate(batches):
        found.add(number, 1, row(batch))
        found.add(number, 0, row(batch[:, :1]))
    return found


def summary(batches: list[torch.Tensor]) -> Summary:
    _, found, _ = tally(batches).close()[0].split([1, 2, 3])
    return found


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(sizes, st.sampled_from([0.0, 1e3]), st.booleans(), st.integers(0, 99))
def test_both_estimators_are_those_of_naive_loops(sizes: list[int], offset: float, pooled: bool, seed: int) -> None:
    """Pooled, of all the data; else the average of the batches' own, where a batch of one has a mean and no
    variance."""
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(size, 2, generator=generator, dtype=torch.float64) + offset for size in sizes]
    mean, var = summary(batches).statistics(pooled=pooled)
    arrays = [batch.numpy() for batch in batches]
    if pooled:
        if sum(sizes) > 1:
            expected = oracles.mean_and_unbiased_variance(np.concatenate(arrays))
            torch.testing.assert_close((mean, var), tuple(map(torch.tensor, expected)), rtol=1e-7, atol=1e-7)
        return
    torch.testing.assert_close(
        mean, torch.tensor(sum(array.mean(0) for array in arrays) / len(arrays)), rtol=1e-7, atol=1e-7
    )
    varied = [oracles.mean_and_unbiased_variance(array)[1] for array in arrays if len(array) > 1]
    if varied:
        torch.testing.assert_close(var, torch.tensor(sum(varied) / len(varied)), rtol=1e-7, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes)
def test_merging_is_taking_the_batches_together(one: list[int], other: list[int]) -> None:
    """Two ranks, either way around, and one: the same sums."""
    batches = [torch.randn(size, 2, dtype=torch.float64) + 7 for size in one + other]
    together = summary(batches)
    first, second = summary(batches[: len(one)]), summary(batches[len(one) :])
    for merged in (first.merge(second), second.merge(first)):
        torch.testing.assert_close(merged, together)


def test_calls_in_one_batch_are_one_row() -> None:
    """In any order, where nothing is summed up in between."""
    data = torch.randn(30, 2) + 5
    merged = Tally([2], CPU, None)
    for number, part in [(0, data[:4]), (1, data[4:20]), (0, data[20:])]:
        merged.add(number, 0, row(part))
    expected = summary([torch.cat((data[:4], data[20:])), data[4:20]])
    found = merged.summary_of(0)
    torch.testing.assert_close(found.statistics(pooled=False), expected.statistics(pooled=False))
    assert (found.batches.tolist(), found.samples.tolist()) == ([2, 2], [30, 30])


def test_batches_that_are_not_finite_leave_no_trace_but_their_number() -> None:
    """In every sum, whether they are still pending or not."""
    batches = [torch.randn(5, 2) for _ in range(8)]
    poisoned = [batch.clone() for batch in batches]
    poisoned[1][0, 0], poisoned[7][0, 1] = math.nan, math.inf
    together, skipped = tally(poisoned).close()
    assert skipped == {1, 7}
    one, found, none = together.split([1, 2, 3])
    # The other layers' batches are their own affair.
    assert (one.samples, one.batches) == (35, 7)
    assert not torch.stack(none).any()
    expected = summary([batch for k, batch in enumerate(batches) if k not in (1, 7)])
    torch.testing.assert_close(found.statistics(pooled=True), expected.statistics(pooled=True))
    torch.testing.assert_close(found.standard_error(0.0), expected.standard_error(0.0))
    assert found.samples.tolist() == [30, 30]


def test_one_batch_has_no_standard_error() -> None:
    """NaN, which is below no tolerance; none with no data."""
    assert summary([torch.randn(5, 2)]).standard_error(1e-5).isnan()
    assert Tally([2], CPU, 3).summary().standard_error(1e-5).isnan()
    assert not torch.stack(Tally([2], CPU, 3).close()[0]).any()


def test_a_layer_alone_is_as_the_layer_among_others() -> None:
    """What one layer has seen so far, asked for in the middle, and what all have seen side by side."""
    batches = [torch.randn(5, 2) + 3 for _ in range(6)]
    batches[2][1, 1] = math.nan
    found = tally(batches, None)
    alone, (_, together, _) = found.summary_of(1), found.summary().split([1, 2, 3])
    assert alone.samples.tolist() == together.samples.tolist() == [25, 25]
    torch.testing.assert_close(alone.statistics(pooled=True), together.statistics(pooled=True))
    torch.testing.assert_close(alone.standard_error(1e-5), together.standard_error(1e-5))
    assert found.summary_of(2) is None


def test_channels_that_are_constant_have_no_error() -> None:
    """0 / 0 is no reason to read on: a dead channel counts as known."""
    batches = [torch.cat((torch.zeros(5, 1), torch.randn(5, 1)), 1) for _ in range(4)]
    alone = [batch[:, 1:] for batch in batches]
    torch.testing.assert_close(
        summary(batches).standard_error(1e-5), summary(alone).standard_error(1e-5) / math.sqrt(2)
    )
