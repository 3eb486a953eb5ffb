"""Small activations wait for others of their shape: whatever they are read with, each has its own values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bn.activations import readings
from lightning_bn.activations.collector import LayerCollector
from lightning_bn.activations.watched_layers import select_layers


class Scaled(nn.Module):
    """Layers whose outputs have one shape, each followed by an activation that overwrites it."""

    def __init__(self, scales: list[float]) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(3) for _ in scales])
        self.relus = nn.ModuleList([nn.ReLU(inplace=True) for _ in scales])
        for norm, scale in zip(self.norms, scales, strict=True):
            nn.init.constant_(norm.weight, scale)
            nn.init.constant_(norm.bias, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        for norm, relu in zip(self.norms, self.relus, strict=True):
            x = relu(norm(x))
        return x


def oracle(values: Tensor) -> dict[str, float]:
    """Plain loops in double precision over the finite values; one that is not counts as a 0 in the range."""
    flat = [float(value) for value in values.double().flatten()]
    finite = [value for value in flat if math.isfinite(value)]
    mean = math.fsum(finite) / len(finite)
    deviation = math.sqrt(math.fsum([(value - mean) ** 2 for value in finite]) / (len(finite) - 1))
    ends = finite + [0.0] * (len(finite) < len(flat))
    found = {"mean": mean, "std": deviation, "min": min(ends), "max": max(ends)}
    return found | {"nonfinite": float(len(flat) - len(finite)), "zeros": float(flat.count(0.0)) / len(flat)}


@pytest.mark.parametrize("waiting", [0, 3_000, 2**20], ids=["each by itself", "few together", "all together"])
@pytest.mark.parametrize("spoil", [None, math.nan, math.inf, 1e20], ids=str)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_each_layer_has_its_own_values(
    waiting: int, spoil: float | None, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one that is not finite, or next to too large, and though what follows writes each output in place."""
    monkeypatch.setattr(readings, "MAX_BYTES", waiting)
    torch.manual_seed(0)
    model = Scaled([1.0, 30.0, 0.001, 2.0])
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if spoil is not None and name == "relus.1":
                output[0, 0, 0, 0] = spoil
            kept[name] = output.clone()

        return hook

    for name, layer in select_layers(model).items():
        layer.register_forward_hook(keep(name))
    collector = LayerCollector(model, select_layers(model))
    collector.attach()
    with torch.no_grad():
        model(torch.randn(4, 3, 6, 6).contiguous(memory_format=form))
    collector.detach()
    rows = collector.collect().rows
    for name, values in kept.items():
        expected = oracle(values)
        for column in ("mean", "std", "min", "max", "nonfinite"):
            assert rows[name][column] == pytest.approx(expected[column], rel=1e-6, abs=1e-7), (name, column)
        if name.startswith("relus"):
            assert rows[name]["zero_fraction"] == expected["zeros"]


def test_few_bytes_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most as many as may, whatever the model's size, and none of an activation that is large by itself."""
    model = nn.Sequential(*[nn.BatchNorm2d(8) for _ in range(40)])
    collector = LayerCollector(model, select_layers(model))
    most = 0
    real = readings.Readings.take

    def take(self: readings.Readings, *args: Any) -> Any:
        nonlocal most
        found = real(self, *args)
        most = max(most, sum(each.nbytes for _, tensors in self._waiting.values() for each in tensors))
        return found

    monkeypatch.setattr(readings.Readings, "take", take)
    for size, limit in ((32, readings.MAX_BYTES), (70, 0)):
        most = 0
        collector.attach()
        model(torch.randn(4, 8, size, size))
        collector.detach()
        assert len(collector.collect().layers) == 41  # and the input
        assert (0 < most <= limit) or most == limit == 0


def test_what_waited_and_cannot_be_read_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each layer of that shape it is said why, and the others have their rows."""
    real = readings.read

    def read(parts: Any, **options: Any) -> Any:
        if parts[0].shape[1] == 4:
            raise NotImplementedError("no kernel for this")
        return real(parts, **options)

    monkeypatch.setattr(readings, "read", read)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid())
    collector = LayerCollector(model, select_layers(model))
    collector.attach()
    model(torch.randn(8, 3))
    collector.detach()
    assert list(collector.collect().layers) == ["input", "3"]
    assert collector.left_out() == dict.fromkeys(("1", "5"), "NotImplementedError: no kernel for this")


@pytest.mark.parametrize("small", [0, readings.SMALL], ids=["read at once", "waits"])
def test_what_is_wanted_besides_and_fails_leaves_the_layer_out(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of channels by channels may be too large for the device: the others have their rows."""

    def gram(data: Tensor) -> Tensor:
        if data.shape[1] == 4:
            raise MemoryError("4 x 4")
        return real(data)

    real = readings.gram
    monkeypatch.setattr(readings, "gram", gram)
    monkeypatch.setattr(readings, "SMALL", small)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Tanh())
    collector = LayerCollector(model, select_layers(model), ranked=["1", "3"])
    collector.attach()
    model(torch.randn(8, 3))
    collector.detach()
    assert list(collector.collect().layers) == ["input", "3"]
    assert collector.left_out() == {"1": "MemoryError: 4 x 4"}
