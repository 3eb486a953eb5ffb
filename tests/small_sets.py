"""A network with several sets of statistics, for their tests."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_bn import Exponential, StatisticsSets, Window, convert_batch_norm

NAMES = ["clean", "width=0.5", ""]
LAYERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch": lambda model: model,
    "ours": convert_batch_norm,
    "window": lambda model: convert_batch_norm(model, Window(3)),
    "debiased": lambda model: convert_batch_norm(model, Exponential(0.1, debias=True)),
}


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def batches(number: int = 2) -> list[Tensor]:
    return [torch.randn(8, 3, 6, 6) * (1 + place) + place for place in range(number)]


def loss(output: Tensor) -> Tensor:
    return output.softmax(1)[:, 0].mean()


class Whole(nn.Module):
    """A network and its sets, as a LightningModule holds them."""

    def __init__(self, *, affine: bool = False, layers: str = "torch", names: list[str] = NAMES) -> None:
        super().__init__()
        self.net = LAYERS[layers](network())
        self.sets = StatisticsSets(self.net, names, affine=affine)


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if "running_" in key or "tracked" in key}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def train(whole: Whole, data: list[Tensor] | None = None) -> None:
    for name, batch in zip(NAMES, data or batches(3), strict=True):
        with whole.sets.use(name):
            loss(whole.net(batch)).backward()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter -= parameter.grad
            parameter.grad = None


def statistics_of(whole: Whole, name: str) -> dict[str, Tensor]:
    with whole.sets.use(name):
        return copy.deepcopy(statistics(whole.net))
