"""What the table of tools in docs/compatibility.md says, for the tools that the tests have."""

from __future__ import annotations

import copy
from collections.abc import Callable

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
    with pytest.raises((ValueError, RuntimeError, torch.fx.proxy.TraceError)):
        transform(model)
    assert torch.equal(transform(to_torch(copy.deepcopy(model)))(batch), model(batch))
