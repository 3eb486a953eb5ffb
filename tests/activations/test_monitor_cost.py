"""What a sampled step of the monitor launches and allocates, counted on the meta device, where whatever asks for a
value raises."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_bn.activations.collector import LayerCollector
from lightning_bn.activations.watched_layers import select_layers

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
from operations import Operations
from resnet import resnet50


class Given(TorchDispatchMode):
    """The sizes and dtypes of the tensors that operations gave."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[tuple[int, torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self.tensors.append((tensor.numel(), tensor.dtype, tensor.nbytes))
        return result


@contextmanager
def sampled(model: nn.Module, collector: LayerCollector | None) -> Iterator[None]:
    if collector is not None:
        collector.attach()
    yield
    if collector is not None:
        collector.detach()
        collector.measure()


def operations(model: nn.Module, collector: LayerCollector | None) -> int:
    with Operations() as seen, sampled(model, collector):
        model(torch.empty(2, 3, 32, 32, device="meta")).sum().backward()
    return seen.calls.total() - seen.calls[torch.ops.aten.detach.default]  # which launches nothing


def test_a_sampled_step_launches_twelve_operations_a_layer() -> None:
    """Forward, backward and all that comes before the one transfer, for 52 batch norms and 49 ReLUs, without a wait for
    the device."""
    with torch.device("meta"):
        model = resnet50(16)
    layers = select_layers(model)
    assert len(layers) == 101
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in layers.values()) == 52
    collector = LayerCollector(model, layers)
    operations(model, collector)  # the first time the drift meter looks at each layer's rule, on the host
    plain, watched = operations(model, None), operations(model, collector)
    assert plain > 600
    assert 0 < watched - plain <= 12 * len(layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("spoiled", [False, True], ids=["finite", "NaN"])
def test_no_tensor_is_wider_than_twice_the_activation(dtype: torch.dtype, device: str, spoiled: bool) -> None:
    """None that a hook makes takes more than two activations' memory, and none as long as one is float64."""
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()).to(device=device, dtype=dtype)
    collector = LayerCollector(model, select_layers(model))
    data = torch.ones(16, 8, 16, 16, dtype=dtype, device=device)
    if spoiled:
        data[0, 0, 0, 0] = torch.nan
    with Given() as plain:
        model(data)
    collector.attach()
    with Given() as given:
        model(data)
    assert len(given.tensors) > len(plain.tensors)
    assert max(size for *_, size in given.tensors) <= 2 * data.numel() * data.element_size()
    assert not any(number >= data.numel() and kind == torch.float64 for number, kind, _ in given.tensors)
