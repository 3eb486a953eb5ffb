"""ActivationStats against plain Python loops, for any cut, order and spread of the data."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_bn import ActivationStats
from lightning_bn.activations.tensor_to_moments import histogram_edges

NAN, INF = math.nan, math.inf


def oracle(batches: list[Tensor], channels: int, bounds: tuple[float, float] | None = None) -> dict[str, Any]:
    """The statistics by loops over floats; it shares no code with the package."""
    values: list[list[float]] = [[] for _ in range(channels)]
    for batch in batches:
        for sample in batch.double():
            for channel in range(channels):
                values[channel] += sample[channel].flatten().tolist()

    def mean_std(numbers: list[float]) -> tuple[float, float]:
        if not numbers:
            return NAN, NAN
        mean = math.fsum(numbers) / len(numbers)
        if len(numbers) < 2:
            return mean, NAN
        return mean, math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))

    every = [number for channel in values for number in channel]
    finite = [[number for number in channel if math.isfinite(number)] for channel in values]
    flat = [number for channel in finite for number in channel]
    found: dict[str, Any] = {
        "mean": mean_std(flat)[0],
        "std": mean_std(flat)[1],
        "abs_max": max(map(abs, flat), default=NAN),
        "zero_fraction": sum(number == 0 for number in every) / len(every) if every else NAN,
        "dead_fraction": sum(all(number == 0 for number in channel) for channel in values) / channels if every else NAN,
        "nonfinite": len(every) - len(flat),
        "channel_mean": [mean_std(channel)[0] for channel in finite],
        "channel_std": [mean_std(channel)[1] for channel in finite],
    }
    if bounds is not None:
        margin = 0.025 * (bounds[1] - bounds[0])
        saturated = sum(number <= bounds[0] + margin or number >= bounds[1] - margin for number in every)
        found["saturated_fraction"] = saturated / len(every) if every else NAN
    return found


def measured(batches: list[Tensor], channels: int, **options: Any) -> dict[str, Any]:
    stats = ActivationStats(channels, **options)
    for batch in batches:
        stats.update(batch)
    return plain(stats.compute())


def plain(values: dict[str, Tensor]) -> dict[str, Any]:
    # torchmetrics gives a result of one element without its dimension.
    return {
        name: value.flatten().tolist() if name.startswith("channel") else value.tolist()
        for name, value in values.items()
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-6) -> None:
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True), name


def relu_like(*shape: int) -> Tensor:
    """Data with a dead channel (0) and one with a large offset and small spread (1)."""
    data = torch.randn(shape).relu()
    data[:, 0] = 0
    data[:, 1] = 1000 + 0.01 * torch.randn(data[:, 1].shape)
    return data


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 5), (4, 3, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("spoiled", [False, True], ids=["finite", "with NaN and inf"])
def test_statistics_are_those_of_plain_loops(shape: tuple[int, ...], spoiled: bool) -> None:
    """All statistics over several batches, one of them empty, equal loops over floats, for every rank of input."""
    batches = [relu_like(*shape), relu_like(*shape)[:0], relu_like(*shape)[:2]]
    if spoiled:
        batches[0].view(-1)[::7] = NAN
        batches[2][0, 1] = INF
        batches[2][1, 2] = -INF
    assert_same(measured(batches, 3), oracle(batches, 3))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_changes_nothing(memory_format: torch.memory_format) -> None:
    """A channels_last activation has the same statistics."""
    data = relu_like(8, 3, 6, 5)
    assert_same(measured([data.to(memory_format=memory_format)], 3), oracle([data], 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_is_summed_in_high(dtype: torch.dtype) -> None:
    """16-bit activations give what the loops give for the same 16-bit values, where a 16-bit sum would stall."""
    data = (torch.rand(300, 2, 20) + 3).to(dtype)
    assert_same(measured([data], 2), oracle([data], 2), 1e-6)


def test_on_every_device(device: torch.device) -> None:
    """State and result live on the activation's device."""
    data = relu_like(5, 3, 4)
    data[0, 2, 0] = NAN
    with device:
        stats = ActivationStats(3, bounds=(0.0, 1.0), histogram=True)
    stats.update(data.to(device))
    values = stats.compute()
    assert all(value.device.type == device.type for value in values.values())
    assert_same(plain(values), oracle([data], 3, (0.0, 1.0)))


def test_the_path_of_an_accelerator_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no value may be looked at, masks do what the branch on the CPU does; both equal the loops."""
    data = relu_like(7, 3, 4)
    assert_same(measured([data], 3), oracle([data], 3))
    monkeypatch.setattr("lightning_bn.activations.tensor_to_moments._may_look", lambda data: False)
    assert_same(measured([data], 3), oracle([data], 3))


def test_exploding_values_do_not_overflow() -> None:
    """Values whose squares exceed float32 have a finite standard deviation."""
    data = torch.tensor([[1e30], [-1e30], [2e30]])
    assert_same(measured([data], 1), oracle([data], 1))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.lists(st.integers(0, 5), min_size=1, max_size=5), st.randoms(use_true_random=False)
)
def test_any_cut_and_order_is_the_same(seed: int, sizes: list[int], random: Any) -> None:
    """However the samples are cut into batches, permuted, and merged from several metrics, the result is that of all of
    them at once."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(sum(sizes), 2, 3, generator=generator) * 10 + 100
    data[torch.rand(data.shape, generator=generator) < 0.1] = NAN
    data[torch.rand(data.shape, generator=generator) < 0.3] = 0
    batches = list(data[torch.randperm(len(data), generator=generator)].split(sizes))
    random.shuffle(batches)
    expected = oracle([data], 2)
    assert_same(measured(batches, 2), expected)
    merged = ActivationStats(2)
    merged.update(batches[0])
    for batch in batches[1:]:
        other = ActivationStats(2)
        other.update(batch)
        merged.merge_state(other)
    assert_same(plain(merged.compute()), expected)


def test_dead_is_not_sparse() -> None:
    """A channel that fires once is not dead, however many of its values are zero; a NaN is no zero."""
    data = torch.zeros(10, 3)
    data[9, 1] = 1e-30
    data[0, 2] = NAN
    values = measured(list(data.split(1)), 3)
    assert values["dead_fraction"] == pytest.approx(1 / 3)
    assert values["zero_fraction"] == pytest.approx(28 / 30)


@pytest.mark.parametrize(("function", "bounds"), [(torch.sigmoid, (0.0, 1.0)), (torch.tanh, (-1.0, 1.0))])
def test_saturation_is_where_the_slope_is_small(function: Any, bounds: tuple[float, float]) -> None:
    """The saturated share is that of the values at which the function's slope is below a tenth of its largest, to
    2.5%."""
    inputs = torch.linspace(-8, 8, 4001, dtype=torch.float64, requires_grad=True)
    outputs = function(inputs)
    (slope,) = torch.autograd.grad(outputs.sum(), inputs)
    flat = (slope < 0.0975 * slope.max()).double().mean().item()
    data = outputs.detach().unsqueeze(1)
    found = measured([data], 1, bounds=bounds)
    assert found["saturated_fraction"] == pytest.approx(flat, abs=1e-3)
    assert_same(found, oracle([data], 1, bounds))


def test_histogram_counts_every_finite_value() -> None:
    """Each finite value is in the bucket between its two edges, and NaN and infinite ones in none."""
    data = torch.cat(
        (torch.randn(500, 1) * 10 ** torch.linspace(-6, 6, 500)[:, None], torch.tensor([[0.0], [NAN], [INF], [-INF]]))
    )
    edges = histogram_edges().tolist()
    expected = [0] * (len(edges) + 1)
    for value in data.flatten().tolist():
        if math.isfinite(value):
            expected[sum(edge < value for edge in edges)] += 1
    assert measured(list(data.split(100)), 1, histogram=True)["histogram"] == expected


@pytest.mark.parametrize("shape", [(4, 7, 3), (4, 2, 5, 3)], ids=str)
def test_channels_may_come_last(shape: tuple[int, ...]) -> None:
    """channel_dim=-1 means the last dimension."""
    data = torch.randn(shape)
    assert_same(measured([data], 3, channel_dim=-1), oracle([data.movedim(-1, 1)], 3))


def test_a_vector_is_one_channel() -> None:
    """An activation of shape (N,) counts as (N, 1)."""
    data = torch.randn(9)
    assert_same(measured([data], 1), oracle([data.unsqueeze(1)], 1))


def test_reset_forgets_and_pickle_keeps() -> None:
    """A reset metric gives what a new one gives; a pickled one goes on where it was."""
    first, second = relu_like(4, 3), relu_like(5, 3)
    stats = ActivationStats(3)
    stats.update(first)
    stats = pickle.loads(pickle.dumps(stats))
    stats.update(second)
    assert_same(plain(stats.compute()), oracle([first, second], 3))
    stats.reset()
    stats.update(second)
    assert_same(plain(stats.compute()), oracle([second], 3))


def test_calling_the_metric_gives_the_batch_and_keeps_the_whole() -> None:
    """forward() returns the batch's own statistics and takes the batch in, as every torchmetrics metric does."""
    first, second = relu_like(4, 3), relu_like(5, 3)
    stats = ActivationStats(3)
    stats(first)
    assert_same(plain(stats(second)), oracle([second], 3))
    assert_same(plain(stats.compute()), oracle([first, second], 3))


def test_no_graph_is_kept() -> None:
    """Activations that require grad leave no graph in the state."""
    stats = ActivationStats(2)
    stats.update(torch.randn(3, 2, requires_grad=True) * 2)
    assert not any(state.requires_grad for state in stats.metric_state.values())


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ActivationStats(0), ValueError, "at least 1"),
        (lambda: ActivationStats(2, bounds=(1.0, 0.0)), ValueError, "least, greatest"),
        (lambda: ActivationStats(2).update(torch.zeros(4, 3)), ValueError, r"shape \(4, 3\).*no 2 channels"),
        (lambda: ActivationStats(2).update(torch.zeros(4, 2, dtype=torch.int64)), TypeError, "floating point"),
    ],
)
def test_mistakes_are_told(build: Any, error: type[Exception], message: str) -> None:
    """A wrong argument raises at once and says what to pass."""
    with pytest.raises(error, match=message):
        build()


def _rank(rank: int, world: int, folder: Path, batches: list[list[Tensor]]) -> dict[str, Any]:
    processes.join_group(rank, world, folder / "store")
    stats = ActivationStats(3, histogram=True)
    for batch in batches[rank]:
        stats.update(batch)
    return plain(stats.compute())


def test_two_processes_are_as_one(tmp_path: Any) -> None:
    """compute() on either of two gloo processes gives the statistics of the data of both, also where one has none."""
    for name, batches in {
        "both": [[relu_like(4, 3)], [relu_like(2, 3), relu_like(3, 3)]],
        "one": [[relu_like(4, 3)], []],
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        found = processes.results(_rank, 2, folder, batches)
        for values in found:
            assert_same(values, oracle([batch for rank in batches for batch in rank], 3))
            assert values["histogram"] == found[0]["histogram"]


@pytest.mark.parametrize(
    ("one", "other"),
    [({"bounds": (0, 6)}, {"bounds": (-1, 1)}), ({}, {"channel_dim": 2}), ({}, {"bounds": (-1, 1)})],
    ids=["bounds", "channel_dim", "with bounds and without"],
)
def test_a_collection_keeps_metrics_apart_that_begin_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two metrics with different options and the same state after the first batch are not one compute group."""
    batches = [torch.full((8, 4, 4), 0.5), torch.linspace(0.9, 1, 128).view(8, 4, 4)]
    collection = MetricCollection({"one": ActivationStats(4, **one), "other": ActivationStats(4, **other)})
    for batch in batches:
        collection.update(batch)
    found = plain(collection.compute())
    for name, options in (("one", one), ("other", other)):
        for key, value in measured(batches, 4, **options).items():
            assert found.get(f"{name}_{key}", found.get(key)) == value


def test_a_collection_shares_the_state_of_equal_metrics() -> None:
    """Metrics of the same options compute once."""
    collection = MetricCollection({"one": ActivationStats(4), "other": ActivationStats(4)})
    collection.update(torch.randn(8, 4))
    assert len(collection.compute_groups) == 1
