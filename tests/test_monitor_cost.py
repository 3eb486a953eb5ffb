"""What a sampled step of the monitor launches and allocates, counted on the meta device, where whatever asks for a
value raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_bn.activations.collector import LayerCollector
from lightning_bn.activations.layers import select_layers


class Counts(TorchDispatchMode):
    """Operations launched, and the bytes and dtypes of the tensors that they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.given: list[tuple[int, torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1  # not before: the meta device has no kernel for some, and another one follows
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.given.append((tensor.numel(), tensor.dtype, tensor.numel() * tensor.element_size()))
        return result


class Bottleneck(nn.Module):
    """Figure 5 right of He et al. (2016), with a ReLU module for each place."""

    def __init__(self, inputs: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        outputs = 4 * width
        self.branch = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        shortcut = (
            (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if project
            else (nn.Identity(),)
        )
        self.shortcut, self.relu = nn.Sequential(*shortcut), nn.ReLU()

    def forward(self, data: Tensor) -> Tensor:
        return self.relu(self.branch(data) + self.shortcut(data))


def resnet(width: int = 16) -> nn.Sequential:
    """52 batch norms after 16 blocks without a norm in the stem, and 49 ReLUs."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.ReLU()]
    inputs = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            own = width * 2**stage
            layers.append(Bottleneck(inputs, own, 2 if stage and not block else 1, project=not block))
            inputs = 4 * own
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


@contextmanager
def sampled(model: nn.Module, collector: LayerCollector | None) -> Iterator[None]:
    if collector is not None:
        collector.attach()
    yield
    if collector is not None:
        collector.detach()
        collector.measure()


def operations(model: nn.Module, collector: LayerCollector | None) -> int:
    with Counts() as counts, sampled(model, collector):
        model(torch.empty(2, 3, 32, 32, device="meta")).sum().backward()
    return counts.operations


def test_a_sampled_step_launches_twelve_operations_a_layer() -> None:
    """Forward, backward and all that comes before the one transfer, for 52 batch norms and 49 ReLUs, without a wait for
    the device."""
    with torch.device("meta"):
        model = resnet()
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
    plain = Counts()
    with plain:
        model(data)
    collector.attach()
    with Counts() as counts:
        model(data)
    assert len(counts.given) > len(plain.given)
    assert max(size for *_, size in counts.given) <= 2 * data.numel() * data.element_size()
    assert not any(number >= data.numel() and kind == torch.float64 for number, kind, _ in counts.given)
