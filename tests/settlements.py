"""A model whose layers settle together, every average with its oracle, and a record of what the layers were given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracles
import pytest
import torch
from states import norms
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn import Averaging, Cumulative, Exponential, Window, convert_batch_norm
from lightning_bn.layers.settlement import is_deferred

Oracle = Callable[[list[oracles.Array]], tuple[oracles.Array, oracles.Array]]
AVERAGES: dict[str, tuple[Averaging | None, Oracle]] = {
    "plain": (None, lambda b: oracles.exponential(b, 0.1, False, False)),
    "exponential": (Exponential(0.3), lambda b: oracles.exponential(b, 0.3, False, False)),
    "debiased": (Exponential(0.3, debias=True), lambda b: oracles.exponential(b, 0.3, True, False)),
    "pooled exponential": (Exponential(0.3, pooled=True), lambda b: oracles.exponential(b, 0.3, False, True)),
    "cumulative": (Cumulative(), lambda b: oracles.cumulative(b, False)),
    "pooled cumulative": (Cumulative(pooled=True), lambda b: oracles.cumulative(b, True)),
    **{f"window of {n}": (Window(n), lambda b, n=n: oracles.window(b, n, False)) for n in (1, 2, 3, 5)},
    **{f"pooled window of {n}": (Window(n, pooled=True), lambda b, n=n: oracles.window(b, n, True)) for n in (2, 3)},
}
each_average = pytest.mark.parametrize("name", AVERAGES)
few_averages = pytest.mark.parametrize("name", ["plain", "window of 3", "pooled window of 3"])


class Net(nn.Module):
    """Three batch norms of different widths, 2d and 1d, and a part that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 2), nn.BatchNorm2d(5)
        )
        self.side = nn.Sequential(nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5))
        self.head = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
        self.use_side = True

    def forward(self, batch: Tensor) -> Tensor:
        features = self.body(batch)
        if self.use_side:
            features = features + self.side(features)
        return self.head(features.mean((2, 3)))


def net(name: str) -> Net:
    torch.manual_seed(0)
    return convert_batch_norm(Net(), AVERAGES[name][0])  # type: ignore[return-value]


def batches(count: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(3 + t % 3, 2, 6, 6, generator=generator) * (1 + t % 4) + t % 2 for t in range(count)]


class Record:
    """What each layer of a model has been given in training, and whether it had scratch rows then."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: dict[str, list[oracles.Array]] = {name: [] for name in norms(model)}
        self.deferred: list[bool] = []
        for name, layer in norms(model).items():
            layer.register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(layer: _BatchNorm, args: tuple[Tensor]) -> None:
            if layer.training and layer.track_running_stats:
                self.inputs[name].append(oracles.channels(args[0]))
                self.deferred.append(is_deferred(layer))

        return hook


def agree(model: nn.Module, record: Record, oracle: Oracle) -> None:
    """Every layer holds what a float64 loop makes of the batches that it was given."""
    for name, layer in norms(model).items():
        seen = [batch for batch in record.inputs[name] if np.isfinite(batch).all() and len(batch)]
        assert layer.num_batches_tracked == len(seen), name
        for buffer, expected in zip((layer.running_mean, layer.running_var), oracle(seen), strict=True):
            np.testing.assert_allclose(buffer.double().numpy(), expected, rtol=1e-5, atol=1e-5, err_msg=name)


def network(norm: type[nn.BatchNorm1d] = nn.BatchNorm1d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), norm(4), nn.Linear(4, 4), norm(4))


def step(model: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)
    output: Tensor = model(torch.randn(8, 4) + seed)
    output.square().sum().backward()
    return output.detach()
