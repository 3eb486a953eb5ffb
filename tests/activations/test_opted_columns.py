"""Kurtosis, and the columns that are asked for: effective rank, norms of gradients, ratios of steps to weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fitting import trainer
from scipy.stats import entropy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import ActivationStatsMonitor
from lightning_bn.activations.collector import LayerCollector
from lightning_bn.activations.effective_rank import effective_rank, gram
from lightning_bn.activations.watched_layers import select_layers


def collected(model: nn.Module, *batches: Tensor, **options: Any) -> dict[str, dict[str, float | None]]:
    collector = LayerCollector(model, select_layers(model), **options)
    collector.attach()
    for batch in batches:
        model(batch)
    collector.detach()
    return collector.collect().rows


def test_kurtosis_is_the_fourth_moment_of_the_channels_over_the_square_of_the_second() -> None:
    """Of their root mean squares, as in He et al. (2024): 1 where all are alike, and the channels' number where one is
    alone."""
    torch.manual_seed(0)
    scales = torch.tensor([1.0, 0.5, 30.0, 2.0, 0.0])
    model = nn.Sequential(nn.Tanhshrink())
    data = torch.randn(64, 5) * scales
    out = model(data).double().numpy()
    rms = [np.sqrt(np.mean(out[:, channel] ** 2)) for channel in range(5)]
    expected = np.mean([s**4 for s in rms]) / np.mean([s**2 for s in rms]) ** 2
    assert collected(model, data)["0"]["kurtosis"] == pytest.approx(expected, rel=1e-5)
    alone, alike = (collected(model, torch.ones(4, 5) * 3 * mask)["0"]["kurtosis"] for mask in (torch.eye(5)[1], 1.0))
    assert (alone, alike) == (pytest.approx(5.0, rel=1e-6), pytest.approx(1.0, rel=1e-6))
    assert np.isnan(collected(model, torch.zeros(4, 5))["0"]["kurtosis"])


@pytest.mark.parametrize("shape", [(40, 12), (6, 12, 5, 4), (5, 12)], ids=["vectors", "images", "fewer than channels"])
def test_effective_rank_is_that_of_the_singular_values_of_all_batches(shape: tuple[int, ...]) -> None:
    """exp of scipy's entropy of numpy's singular values, over two batches together, in float64."""
    torch.manual_seed(0)
    batches = [torch.randn(shape) * torch.logspace(0, -4, 12).reshape(1, 12, *[1] * (len(shape) - 2)) for _ in "ab"]
    model = nn.Sequential(nn.Softplus())
    rows = np.concatenate(
        [model(each).double().numpy().swapaxes(1, -1).reshape(-1, 12) for each in batches]
    )  # the order of the positions is no matter
    expected = np.exp(entropy(np.linalg.svd(rows, compute_uv=False)))
    assert collected(model, *batches, ranked=None)["0"]["effective_rank"] == pytest.approx(expected, rel=1e-6)


def test_effective_rank_of_known_matrices() -> None:
    """1 for multiples of one vector, C for an orthogonal matrix, half of it for half the channels; NaN counts as 0."""
    model = nn.Sequential(nn.Identity(), nn.LeakyReLU(1.0))
    one = torch.outer(torch.arange(1.0, 7.0), torch.randn(8))
    for data, expected in ((one, 1.0), (torch.eye(8), 8.0), (torch.eye(8)[:4], 4.0)):
        assert collected(model, data, ranked=None)["1"]["effective_rank"] == pytest.approx(expected, rel=1e-6)
    spoiled = torch.eye(8)
    spoiled[0, 0] = torch.nan
    assert collected(model, spoiled, ranked=None)["1"]["effective_rank"] == pytest.approx(7.0, rel=1e-6)


def test_effective_rank_of_products_that_overflow_is_unknown() -> None:
    """A number beyond the root of the largest makes infinite products, and NaN of their differences."""
    huge = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64) * 1e200
    assert np.isnan(effective_rank(gram(huge)))
    assert effective_rank(gram(huge / 1e100)) > 1


def test_effective_rank_is_measured_of_the_layers_that_are_asked_for() -> None:
    """None of the others, and of none by default."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU())
    data = torch.randn(16, 4)
    for ranked, measured in (((), []), (["3"], ["3"]), (None, ["1", "3"])):
        rows = collected(model, data, ranked=ranked)
        assert [name for name, row in rows.items() if row["effective_rank"] is not None] == measured


class Steps(pl.LightningModule):
    """Keeps what each step did to each layer, by copies and loops of its own."""

    def __init__(self, *, manual: int = 0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3, bias=False))
        self.automatic_optimization, self.manual, self.kept = not manual, manual, []
        self.before: dict[str, Any] = {}
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for _ in range(self.manual):
            loss = self.frozen(self.net(batch)).square().mean()
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return self.frozen(self.net(batch)).square().mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for name, module in self.named_modules():
            if own := [each for each in module.parameters(recurse=False) if each.grad is not None]:
                weights = [each.detach().double().numpy().copy() for each in own]
                first, _ = self.before.get(name, (weights, None))
                self.before[name] = first, [each.grad.double().numpy().copy() for each in own]

    def on_train_batch_end(self, *_: Any) -> None:
        found = {}
        for name, parts in self.before.items():
            now = [each.detach().double().numpy() for each in self.get_submodule(name).parameters(recurse=False)]
            flat = [np.concatenate([each.ravel() for each in part]) for part in (now, *parts)]
            found[name] = (
                np.sqrt((flat[2] ** 2).sum()),
                np.sqrt(((flat[0] - flat[1]) ** 2).sum()) / np.sqrt((flat[1] ** 2).sum()),
            )
        if found:
            self.kept.append(found)
        self.before = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@pytest.mark.parametrize(
    ("manual", "options"),
    [(0, {}), (1, {}), (2, {}), (0, {"gradient_clip_val": 1e-3}), (0, {"accumulate_grad_batches": 2})],
    ids=["automatic", "manual", "twice a batch", "clipped", "accumulated"],
)
def test_norms_of_gradients_and_steps_are_those_of_plain_copies(manual: int, options: dict[str, Any]) -> None:
    """Of each layer with parameters that learn, convolutions and linear layers too; gradients before they are
    clipped. Of two steps in a batch, the gradient of the last, and the way of both."""
    torch.manual_seed(0)
    monitor, module = ActivationStatsMonitor(every_n_steps=1, gradients=True, verbose=False), Steps(manual=manual)
    trainer(monitor, max_steps=3 * max(manual, 1), **options).fit(module, DataLoader(torch.randn(96, 6), 16))
    steps = sorted({row["step"] for row in monitor.table()})
    assert len(steps) == 3
    for step, expected in zip(steps, module.kept, strict=True):
        rows = {row["layer"]: row for row in monitor.table() if row["step"] == step}
        assert list(rows) == ["input", "net.0", "net.1", "net.2", "net.3"]
        assert {name for name, row in rows.items() if row["update_ratio"] is not None} == expected.keys()
        for name, (gradient, ratio) in expected.items():
            assert rows[name]["grad_norm"] == pytest.approx(gradient, rel=1e-5)
            assert rows[name]["update_ratio"] == pytest.approx(ratio, rel=1e-4)


def test_layers_with_weights_alone_have_rows_in_the_order_of_the_model() -> None:
    """Several before the first norm, between two activations, and behind the last one."""
    blocks = [(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()) for _ in "ab"]
    model = nn.Sequential(*blocks[0], *blocks[1], nn.Linear(4, 4))
    collector = LayerCollector(model, select_layers(model), gradients=True, functions=True)
    collector.attach()
    model(torch.randn(8, 4)).sum().backward()
    collector.before_step(model.parameters())
    collector.detach()
    assert list(collector.collect().rows) == ["input", *"012345678"]


def test_without_gradients_there_are_no_rows_for_weights() -> None:
    """The rows are those of norms and activation functions."""
    torch.manual_seed(0)
    monitor = ActivationStatsMonitor(every_n_steps=1, verbose=False)
    trainer(monitor, max_steps=1).fit(Steps(), DataLoader(torch.randn(32, 6), 16))
    assert [row["layer"] for row in monitor.table()] == ["input", "net.1", "net.2"]
    assert all(row["grad_norm"] is None and row["effective_rank"] is None for row in monitor.table())
