"""Activation functions that are not modules, and residual sums: seen, named, and left as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fitting import fit
from small_models import Small
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lightning_bn import ActivationStatsMonitor
from lightning_bn.activations.collector import LayerCollector
from lightning_bn.activations.functional_calls import FunctionalCalls
from lightning_bn.activations.watched_layers import select_layers


class Block(nn.Module):
    """A residual block, whose activation functions are modules or not."""

    def __init__(self, is_functional: bool) -> None:
        super().__init__()
        self.bn1, self.conv, self.bn2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu1, self.relu2 = (nn.ReLU(), nn.ReLU()) if not is_functional else (F.relu, torch.relu_)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu1(self.bn1(x))
        out = self.bn2(self.conv(inner))
        out += x
        return self.relu2(out)


class Net(nn.Module):
    def __init__(self, is_functional: bool, reentrant: bool | None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1)
        self.blocks = nn.ModuleList([Block(is_functional), Block(is_functional)])
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x.mean((1, 2, 3)).tanh()


def rows(model: nn.Module, *batches: Tensor, **options: Any) -> dict[str, dict[str, Any]]:
    collector = LayerCollector(model, select_layers(model), functions=True, **options)
    collector.attach()
    for batch in batches:
        collector.begin_batch()
        model(batch).sum().backward()
    collector.detach()
    return collector.collect().rows


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["eager", "checkpoint", "reentrant checkpoint"])
def test_a_function_has_the_row_of_its_module(reentrant: bool | None) -> None:
    """Number for number, gradients included, in place or not, also where activation checkpointing runs it twice."""
    found = []
    for is_functional in (False, True):
        torch.manual_seed(0)
        model = Net(is_functional, reentrant)
        generator = torch.Generator().manual_seed(1)
        batches = [torch.randn(8, 2, 5, 5, generator=generator) for _ in range(2)]
        found.append(rows(model, *batches, gradients=True))
    modules, functions = found
    first = ["bn1", "relu1", "bn2", "add", "relu2"]
    names = {"relu1": ":relu[1]", "relu2": ":relu[2]", "add": ":add[1]"}
    assert list(functions)[1:6] == [f"blocks.0{names.get(each, f'.{each}')}" for each in first]
    for block in (0, 1):
        for call in (1, 2):
            assert str(functions[f"blocks.{block}:relu[{call}]"]) == str(modules[f"blocks.{block}.relu{call}"])
        assert functions[f"blocks.{block}:add[1]"]["std"] == modules[f"blocks.{block}:add[1]"]["std"]
    assert functions["Net:tanh[1]"]["saturated_fraction"] == 0
    assert functions["blocks.0:add[1]"]["zero_fraction"] is None
    assert not any("relu[" in name for name in modules)


def test_the_function_inside_of_torchs_transformer_is_seen() -> None:
    """nn.TransformerEncoderLayer calls F.gelu, whose channels are in the last dimension, as its layer norms' are."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
    collector = LayerCollector(layer, select_layers(layer), functions=True)
    kept: list[Tensor] = []
    handle = layer.linear2.register_forward_pre_hook(lambda module, args: kept.append(args[0].detach()))
    collector.attach()
    layer(torch.randn(4, 5, 8))
    collector.detach()
    handle.remove()
    sample = collector.collect()
    name = "TransformerEncoderLayer:gelu[1]"
    mean, std = sample.channels[name]
    expected = kept[0].double().reshape(-1, 16)
    torch.testing.assert_close(torch.tensor(mean), expected.mean(0))
    torch.testing.assert_close(torch.tensor(std), expected.std(0))
    assert {"norm1", "norm2", "TransformerEncoderLayer:add[1]", "TransformerEncoderLayer:add[2]"} <= set(sample.layers)
    assert all(len(sample.channels[each][0]) == 8 for each in ("norm1", "norm2", "TransformerEncoderLayer:add[1]"))


@pytest.mark.parametrize(
    ("layers", "shape", "channels"),
    [
        ([nn.Conv1d(3, 6, 1), nn.GELU()], (2, 3, 9), 6),
        ([nn.Linear(3, 6), nn.GELU()], (2, 9, 3), 6),
        ([nn.Linear(3, 6), nn.GELU()], (2, 6, 3), 6),
        ([nn.Linear(3, 6), nn.GELU()], (2, 5, 5, 3), 6),
        ([nn.Linear(3, 6), nn.LayerNorm(6)], (2, 9, 3), 6),
        ([nn.Linear(3, 6), nn.RMSNorm(6)], (2, 9, 3), 6),
        ([nn.Conv2d(3, 6, 1), nn.GroupNorm(2, 6)], (2, 3, 4, 5), 6),
        ([nn.Conv2d(3, 6, 1), nn.ReLU()], (2, 3, 6, 6), 6),
    ],
)
def test_channels_are_found_by_the_layers_around(
    layers: list[nn.Module], shape: tuple[int, ...], channels: int
) -> None:
    """Behind a linear layer they are in the last dimension, behind a convolution in the second."""
    model = nn.Sequential(*layers)
    collector = LayerCollector(model, select_layers(model))
    collector.attach()
    out = model(torch.randn(shape))
    collector.detach()
    mean, _ = collector.collect().channels["1"]
    dim = out.dim() - 1 if isinstance(layers[0], nn.Linear) else 1
    expected = out.detach().double().mean([each for each in range(out.dim()) if each != dim])
    assert len(mean) == channels
    torch.testing.assert_close(torch.tensor(mean), expected, atol=1e-6, rtol=1e-5)


class Functional(Small):
    """A `Small` whose forward calls functions, among them one that a mode of its own watches."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.silu(self.bn1(self.first(inputs)))
        return self.rest(hidden + hidden.tanh())


def test_training_is_left_as_it_is() -> None:
    """With the monitor at every step the weights are bit-identical, and no mode is left behind."""
    with_monitor, _ = fit(ActivationStatsMonitor(every_n_steps=1, gradients=True, verbose=False), module=seeded())
    without, _ = fit(module=seeded())
    for mine, theirs in zip(with_monitor.parameters(), without.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.overrides._get_current_function_mode_stack()


def seeded() -> Small:
    torch.manual_seed(0)
    return Functional()


def test_an_unsampled_step_pays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six steps an epoch one is looked at, and only in its forward a mode is on."""
    made = []
    real = FunctionalCalls.__init__
    monkeypatch.setattr(FunctionalCalls, "__init__", lambda self, *args: made.append(self) or real(self, *args))
    fit(ActivationStatsMonitor(every_n_steps=6, verbose=False), module=seeded(), val=None)
    assert len(made) == 2


def test_a_mode_of_the_models_own_sees_what_layers_call() -> None:
    """One that a forward enters stays in place around the layers, inside of which functions are not looked at; what
    comes behind them is a row."""

    class Seeing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            with Seeing():
                inside = self.bn(x).relu()
            return self.bn(inside).tanh()

    seen: list[str] = []
    model = Model()
    collector = LayerCollector(model, select_layers(model), functions=True)
    collector.attach()
    model(torch.randn(8, 3))
    collector.detach()
    assert [name for name in seen if name in ("batch_norm", "relu")] == ["batch_norm", "relu"]
    assert [name for name in collector.collect().layers if ":" in name] == ["Model:relu[1]", "Model:tanh[1]"]


def test_layers_pay_nothing_for_what_they_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode sees what the model calls itself, and not what happens inside of a layer that has a row."""
    seen = []
    real = FunctionalCalls.__torch_function__

    def see(self: FunctionalCalls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(func.__name__)
        return real(self, func, types, args, kwargs)

    monkeypatch.setattr(FunctionalCalls, "__torch_function__", see)
    model = Net(True, None)
    collector = LayerCollector(model, select_layers(model), functions=True)
    collector.attach()
    model(torch.randn(4, 2, 5, 5))
    collector.detach()
    assert "relu" in seen
    assert "batch_norm" not in seen


@pytest.mark.parametrize("where", ["conv", "bn2"])
def test_a_forward_that_fails_leaves_no_mode(where: str) -> None:
    """Neither where it raises, nor where an interrupt leaves it and the hooks are removed; inside of a layer that has a
    row no more than elsewhere, and a mode of the caller's own stays."""
    for error in (RuntimeError, KeyboardInterrupt):
        model = Net(True, None)
        collector = LayerCollector(model, select_layers(model), functions=True)
        collector.attach()
        layer = getattr(model.blocks[1], where)
        handle = layer.register_forward_pre_hook(lambda *_, error=error: (_ for _ in ()).throw(error))
        with BaseTorchFunctionMode() as own:
            with pytest.raises(error):
                model(torch.randn(4, 2, 5, 5))
            collector.detach()
            assert torch.overrides._get_current_function_mode_stack() == [own]
        handle.remove()
        assert not torch.overrides._get_current_function_mode_stack()
