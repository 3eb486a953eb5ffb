"""What the table of tools in docs/compatibility.md says; of tools that are not installed nothing is tested."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_bn import Averaging, Window, convert_batch_norm, to_torch


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)).eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def by_torch(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images())
    return counter.get_total_flops()


def by_fvcore(model: nn.Module) -> int:
    return FlopCountAnalysis(model, images()).unsupported_ops_warnings(False).total()  # type: ignore[no-any-return]


@pytest.mark.parametrize("averaging", [None, Window(20)], ids=str)
@pytest.mark.parametrize("count", [by_torch, by_fvcore])
def test_operations_are_counted_as_torchs(averaging: Averaging | None, count: Callable[[nn.Module], int]) -> None:
    """By the counters that see operations and not classes."""
    assert count(convert_batch_norm(network(), averaging)) == count(network()) > 0


@pytest.mark.parametrize("averaging", [None, Window(20)], ids=str)
@pytest.mark.parametrize("transform", [torch.fx.symbolic_trace, torch.jit.script])
def test_what_transforms_a_model_takes_torchs_layers(
    averaging: Averaging | None, transform: Callable[[nn.Module], nn.Module]
) -> None:
    """It raises for a converted layer, and after `to_torch` of a copy gives the same outputs."""
    model, batch = convert_batch_norm(network(), averaging), images()
    with pytest.raises((TypeError, torch.fx.proxy.TraceError), match=r"to_torch|symbolically traced"):
        transform(model)
    assert torch.equal(transform(to_torch(copy.deepcopy(model)))(batch), model(batch))


WAYS: dict[str, Callable[[], nn.Module]] = {
    "as built": network,
    "converted": lambda: convert_batch_norm(network()),
    "Window(20)": lambda: convert_batch_norm(network(), Window(20)),
    "to_torch": lambda: to_torch(convert_batch_norm(network(), Window(20))),
}
NORMS = 2 * (8 + 4)
"""Weights and biases of the two norms."""


def counted_by(tool: str, count: Callable[[nn.Module], int]) -> list[int]:
    """Return what the tool counts of each way beyond the same network without batch norms."""
    pytest.importorskip(tool)
    without = network()
    without[1] = without[4] = nn.Identity()
    return [count(make()) - count(without) for make in WAYS.values()]


def test_torchinfo() -> None:
    """Parameters are counted; operations are not of a layer that has a child."""

    def summary(model: nn.Module) -> Any:
        return importlib.import_module("torchinfo").summary(model, input_data=images(), verbose=0)

    assert counted_by("torchinfo", lambda model: summary(model).total_params) == [NORMS] * 4
    built, converted, windowed, back = counted_by("torchinfo", lambda model: summary(model).total_mult_adds)
    assert built == converted == back > windowed == 0


def test_ptflops() -> None:
    """Parameters are counted, and operations of torch's own classes alone."""

    def complexity(model: nn.Module, what: int) -> int:
        tool = importlib.import_module("ptflops").get_model_complexity_info
        shown = {"as_strings": False, "print_per_layer_stat": False, "verbose": False}
        return int(tool(model, (3, 8, 8), backend="pytorch", **shown)[what])

    assert counted_by("ptflops", lambda model: complexity(model, 1)) == [NORMS] * 4
    built, converted, windowed, back = counted_by("ptflops", lambda model: complexity(model, 0))
    assert built == back > converted == windowed == 0


def test_thop() -> None:
    """Neither parameters nor operations are counted but of torch's own classes."""
    for what in (0, 1):
        built, converted, windowed, back = counted_by(
            "thop",
            lambda model, what=what: int(
                importlib.import_module("thop").profile(model, (images(),), verbose=False)[what]
            ),
        )
        assert built == back > converted == windowed == 0


def test_torchview() -> None:
    """A layer that has a child is not drawn."""
    pytest.importorskip("torchview")

    def drawn(model: nn.Module) -> int:
        graph = importlib.import_module("torchview").draw_graph(model, images(), device="cpu")
        return str(graph.visual_graph.source).count("BatchNorm2d")

    assert [drawn(make()) for make in WAYS.values()] == [2, 2, 0, 2]


@pytest.mark.filterwarnings("ignore:(Input Tensor|Setting (forward|backward))")
def test_captum() -> None:
    """DeepLift and integrated gradients are torch's, and LRP has no rule for the classes."""
    attr = pytest.importorskip("captum.attr")
    batch = images()
    for method in (attr.DeepLift, attr.IntegratedGradients):
        expected, *found = [method(make()).attribute(batch, target=(0, 0, 0)) for make in WAYS.values()]
        assert all(torch.equal(each, expected) for each in found)
    for name, make in WAYS.items():
        with nullcontext() if name in ("as built", "to_torch") else pytest.raises(TypeError):
            attr.LRP(make()).attribute(batch, target=(0, 0, 0))


def test_torch_pruning() -> None:
    """Channels of converted layers are removed as of torch's, and training goes on."""
    pruning = pytest.importorskip("torch_pruning")
    for make in WAYS.values():
        model = make()
        convolution, *_ = model
        graph = pruning.DependencyGraph().build_dependency(model, images())
        graph.get_pruning_group(convolution, pruning.prune_conv_out_channels, [1, 2]).prune()
        assert model[1].running_mean.shape == model[1].weight.shape == (6,)
        assert model.train()(images()).isfinite().all()
