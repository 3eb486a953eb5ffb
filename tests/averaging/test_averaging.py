"""Every average equals its closed form, computed by naive float64 loops, at the steps where a mistake would show."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_bn import Averaging, Batch, BatchNorm1d, BatchNorm2d, Cumulative, Exponential, Window
from lightning_bn.moments import wide_dtype

N = 5
STEPS = (1, 2, N - 1, N, N + 1, 3 * N + 1)
Oracle = Callable[[list[oracles.Array]], tuple[oracles.Array, oracles.Array]]

CASES: list[tuple[Averaging, Oracle]] = [
    *(
        (Window(size, pooled=p), lambda b, size=size, p=p: oracles.window(b, size, p))
        for size in (1, 2, 3, N, 6)
        for p in (False, True)
    ),
    *((Cumulative(pooled=p), lambda b, p=p: oracles.cumulative(b, p)) for p in (False, True)),
    *(
        (Exponential(m, debias=d, pooled=p), lambda b, m=m, d=d, p=p: oracles.exponential(b, m, d, p))
        for m in (0.001, 0.3, 1.0)
        for d in (False, True)
        for p in (False, True)
    ),
]
each_average = pytest.mark.parametrize(("averaging", "oracle"), CASES, ids=[str(averaging) for averaging, _ in CASES])


def batches(count: int, *, seed: int = 0, device: torch.device | str = "cpu") -> list[Tensor]:
    """Batches of unequal size whose mean and scale wander, as a network's do."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 7, (count,), generator=generator).tolist()
    return [
        (
            torch.randn(size, 3, 2, 2, generator=generator) * (1 + t % 4)
            + torch.randn(3, 1, 1, generator=generator) * 3
        ).to(device)
        for t, size in enumerate(sizes)
    ]


def agree(layer: nn.Module, expected: tuple[oracles.Array, oracles.Array], rtol: float = 2e-6) -> None:
    """The layer's running statistics are the expected ones, to a few roundings of float32."""
    for buffer, value in zip((layer.running_mean, layer.running_var), expected, strict=True):
        np.testing.assert_allclose(buffer.cpu().double().numpy(), value, rtol=rtol, atol=2e-6)


@each_average
def test_closed_form(averaging: Averaging, oracle: Oracle, device: torch.device) -> None:
    """At steps 1, 2, N-1, N, N+1 and 3N+1, with batches of unequal size, the statistics are the closed form's."""
    layer = BatchNorm2d(3, averaging=averaging, device=device)
    data = batches(max(STEPS), device=device)
    for step, batch in enumerate(data, 1):
        layer(batch)
        if step in STEPS:
            agree(layer, oracle([oracles.channels(b) for b in data[:step]]), rtol=1e-5)
            assert layer.num_batches_tracked == step


@each_average
def test_float64(averaging: Averaging, oracle: Oracle) -> None:
    """A float64 layer's statistics have float64's accuracy: no weight or count on the way has less."""
    layer = BatchNorm2d(3, averaging=averaging, dtype=torch.float64)
    data = [batch.double() for batch in batches(N + 2)]
    for batch in data:
        layer(batch)
    mean, var = oracle([oracles.channels(batch) for batch in data])
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-12)


def test_oracle_goes_red() -> None:
    """The comparison fails on statistics that are off by one part in ten thousand, and on a window that is one batch
    too long."""
    layer = BatchNorm2d(3, averaging=Window(N))
    data = batches(2 * N)
    for batch in data:
        layer(batch)
    right = oracles.window([oracles.channels(b) for b in data], N, False)
    agree(layer, right, rtol=1e-5)
    with pytest.raises(AssertionError):
        agree(layer, (right[0] * 1.0001, right[1]), rtol=1e-5)
    with pytest.raises(AssertionError):
        agree(layer, oracles.window([oracles.channels(b) for b in data], N + 1, False), rtol=1e-5)


@each_average
def test_reset_forgets_everything(averaging: Averaging, oracle: Oracle) -> None:
    """After reset_running_stats the statistics are those of the batches since."""
    layer = BatchNorm2d(3, averaging=averaging)
    for batch in batches(N + 2, seed=1):
        layer(batch)
    layer.reset_running_stats()
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(3))
    data = batches(N + 1, seed=2)
    for batch in data:
        layer(batch)
    agree(layer, oracle([oracles.channels(b) for b in data]), rtol=1e-5)


@each_average
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_resume_is_exact(averaging: Averaging, oracle: Oracle, way: str, tmp_path: object) -> None:
    """Saved in the middle of a window, loaded and trained on, a layer's whole state is bit for bit that of one never
    interrupted."""
    layer = BatchNorm2d(3, averaging=averaging)
    data = batches(3 * N)
    for batch in data[: N + 2]:
        layer(batch)
    if way == "state_dict":
        torch.save(layer.state_dict(), f"{tmp_path}/layer.pt")
        other = BatchNorm2d(3, averaging=averaging)
        other.load_state_dict(torch.load(f"{tmp_path}/layer.pt", weights_only=True), strict=True)
    else:
        other = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
    for batch in data[N + 2 :]:
        layer(batch)
        other(batch)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_debias_leaves_nothing_of_the_start() -> None:
    """After one step at momentum 0.001 the statistics are the batch's: the 0/1 start weighs less than a rounding."""
    layer = BatchNorm1d(1, averaging=Exponential(0.001, debias=True))
    layer(torch.tensor([[1e6], [3e6]]))
    assert torch.equal(layer.running_mean, torch.tensor([2e6]))
    assert torch.equal(layer.running_var, torch.tensor([2e12]))


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_momentum_0_stands_still(debias: bool, pooled: bool) -> None:
    """No batch has any weight: the statistics stay what they are, and no NaN comes of dividing by no weight."""
    layer = BatchNorm1d(3, averaging=Exponential(0.0, debias=debias, pooled=pooled))
    layer.running_mean.fill_(2.0)
    for _ in range(3):
        layer(torch.randn(5, 3))
    assert torch.equal(layer.running_mean, torch.full((3,), 2.0))
    torch.testing.assert_close(layer.running_var, torch.ones(3))


@pytest.mark.parametrize(
    "averaging", [Exponential(0.1), Exponential(0.1, debias=True), Cumulative(), Window(4)], ids=str
)
def test_estimators_part_where_batches_differ(averaging: Averaging) -> None:
    """Within-batch variance misses the spread between batches, and the pooled one has it."""
    pooled = copy.deepcopy(averaging)
    pooled.pooled = True
    within, whole = BatchNorm1d(1, averaging=averaging), BatchNorm1d(1, averaging=pooled)
    for t in range(200):
        batch = torch.randn(16, 1) + (10 if t % 2 else -10)
        within(batch)
        whole(batch)
    assert 0.5 < within.running_var.item() < 2
    assert 80 < whole.running_var.item() < 140


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 5), min_size=1, max_size=30),
    size=st.integers(1, 12),
    pooled=st.booleans(),
    scale=st.floats(1e-3, 1e3),
)
def test_window_of_any_size_over_any_batches(sizes: list[int], size: int, pooled: bool, scale: float) -> None:
    """Whatever the window and the batches, the statistics are those of the last batches."""
    layer = BatchNorm1d(2, averaging=Window(size, pooled=pooled))
    data = [torch.randn(n, 2) * scale + t for t, n in enumerate(sizes)]
    for batch in data:
        layer(batch)
    expected = oracles.window([oracles.channels(b) for b in data], size, pooled)
    np.testing.assert_allclose(layer.running_mean.double(), expected[0], rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(layer.running_var.double(), expected[1], rtol=1e-5)


def test_window_does_not_drift() -> None:
    """After 20,000 steps, some of them a billion times larger, the statistics are the float64 mean of the last N rows
    to 1e-6."""
    size, width = 1000, 4
    averaging = Window(size).for_layer(torch.zeros(width))
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(20_000, width, generator=generator) + 3
    variances = torch.rand(20_000, width, generator=generator)
    # A spike that a running sum would never forget: 1e9 leaves a residue of 1e-7 in float64, of 100 in float32.
    means[10_000], variances[10_000] = 1e9, 1e20
    step, count = torch.tensor(1), torch.tensor(8.0)
    for mean, var in zip(means, variances, strict=True):
        result = averaging.update(mean, var, Batch(mean, var, count, step, None))
    for statistic, rows in zip(result, (means, variances), strict=True):
        torch.testing.assert_close(statistic.double(), rows[-size:].double().mean(0), rtol=1e-6, atol=0)


def test_window_sums_in_a_wide_dtype(device: torch.device) -> None:
    """Equal batches give their own statistics at every step: a float32 sum of 1000 of them would be off by 4e-6."""
    averaging = Window(1000).for_layer(torch.zeros(1, device=device))
    row = torch.full((1,), 0.1, device=device)
    batch = Batch(row, row, torch.tensor(8.0, device=device), torch.tensor(1, device=device), None)
    for _ in range(2100):
        mean, var = averaging.update(row, row, batch)
        torch.testing.assert_close(mean, row, rtol=1e-6 if wide_dtype(device) == torch.float64 else 1e-5, atol=0)
        torch.testing.assert_close(var, mean)


class Last(Averaging):
    """A user's average with a state of its own: the statistics of the batch before the last."""

    def initial_state(self, num_features: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {"before": torch.zeros(2, num_features, dtype=dtype, device=device)}

    def update(self, running_mean: Tensor, running_var: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        mean, var = self.before.clone().unbind()
        batch.write(self.before, torch.stack((batch.mean, batch.var)))
        return mean, var


def test_a_users_averaging() -> None:
    """A subclass with a private state works, is saved, and sees no batch that was skipped."""
    layer = BatchNorm2d(3, averaging=Last())
    first, second = batches(2)
    layer(first)
    layer(first * float("nan"))
    layer(second)
    agree(layer, oracles.mean_and_unbiased_variance(oracles.channels(first)), rtol=1e-5)
    assert layer.num_batches_tracked == 2
    assert "averaging.before" in layer.state_dict()


@pytest.mark.parametrize("size", [0, -3, 2.0, "20", True, None])
def test_window_refuses(size: object) -> None:
    """A size that is no number of batches raises at once, showing the call made and one to make."""
    with pytest.raises(ValueError, match=r"Window\(.*\): size is a number of batches.*Window\(20\)"):
        Window(size)


@pytest.mark.parametrize("momentum", [-0.1, 1.5, "0.1", None, True, float("nan")])
def test_exponential_refuses(momentum: object) -> None:
    """A momentum that is no weight raises at once, showing the call made and one to make."""
    with pytest.raises(ValueError, match=r"Exponential\(.*\): momentum is the weight.*Exponential\(0.1\)"):
        Exponential(momentum)
