"""Models and oracles that the tests of recalibration share."""

from __future__ import annotations

import copy
import random
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from states import as_bytes, norms
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn import BatchNorm1d, RecalibrationReport, Window, recalibrate


class Residual(nn.Module):
    """Two branches that meet: a convolution with batch norm twice, and the input itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.two = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.two(torch.relu(self.bn1(self.one(x))))))


def cnn(blocks: int = 4, width: int = 6) -> nn.Sequential:
    """``1 + 2 * blocks`` batch norms."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), *[Residual(width) for _ in range(blocks)]
    )


def mlp(layers: int = 8, width: int = 16, inputs: int = 10) -> nn.Sequential:
    """`layers` batch norms."""
    widths = [inputs, *[width] * layers]
    blocks = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairwise(widths)]
    return nn.Sequential(*blocks)


class Busy(nn.Module):
    """A model in odd states: a frozen layer in eval, momentum None and 0, a shared layer, hooks, a buffer and random
    numbers in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(3, momentum=None)
        self.frozen = nn.BatchNorm1d(3).requires_grad_(False).eval()
        self.ours = BatchNorm1d(3, averaging=Window(2))
        self.dropout = nn.Dropout(0.5)
        self.last = nn.BatchNorm1d(3, momentum=0.0)
        self.again = self.last
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.first.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.calls = self.calls.clone()
        x = self.dropout(self.ours(self.frozen(self.first(x)))) + torch.rand(3) + np.random.rand() + random.random()
        self.train()  # a model that does as it likes
        self.eval()
        return self.again(self.last(x))


def busy() -> Busy:
    model = Busy()
    for batch in torch.randn(3, 4, 3).unbind():
        model(batch)
    model.train()
    model.frozen.eval()
    return model


def statistics(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Copies of all running statistics."""
    return {name: (layer.running_mean.clone(), layer.running_var.clone()) for name, layer in norms(model).items()}


def full_batch(model: nn.Module, data: Tensor, *args: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The oracle of exactness: in float64, on all the data in one batch, each layer is set to what it gets and then
    runs in eval mode."""
    twin = copy.deepcopy(model).double().eval()

    def set_to_input(layer: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].movedim(1, -1).reshape(-1, layer.num_features).numpy()
        mean = sum(values) / len(values)
        layer.running_mean.copy_(torch.tensor(mean))
        layer.running_var.copy_(torch.tensor(sum((row - mean) ** 2 for row in values) / (len(values) - 1)))

    for layer in norms(twin).values():
        layer.register_forward_pre_hook(set_to_input)
    with torch.no_grad():
        twin(data.double(), *args)
    return statistics(twin)


def largest_errors(
    found: dict[str, tuple[Tensor, Tensor]], truth: dict[str, tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """Error of the mean in standard deviations, and relative error of the variance, of the worst channel."""
    mean = max(
        ((found[name][0].double() - mean).abs() / var.sqrt()).max().item() for name, (mean, var) in truth.items()
    )
    variance = max((found[name][1].double() / var - 1).abs().max().item() for name, (_, var) in truth.items())
    return mean, variance


def everything(model: nn.Module) -> dict[str, Any]:
    """All that must be as before: values as bytes, identities, flags, hooks, random states."""
    found: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": repr(np.random.get_state()),
        "random": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }
    for name, module in model.named_modules():
        hooks = (len(module._forward_pre_hooks), len(module._forward_hooks))
        flags = (module.training, getattr(module, "track_running_stats", None), getattr(module, "momentum", None))
        found[name] = (hooks, flags)
        for key, tensor in [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]:
            found[f"{name}:{key}"] = (
                id(tensor),
                tensor.data_ptr(),
                tensor.requires_grad,
                tensor.grad is None,
                as_bytes(tensor),
            )
    for name, layer in norms(model).items():
        averaging = getattr(layer, "averaging", None)
        found[f"{name}:history"] = (
            {key: as_bytes(value) for key, value in averaging.state_dict().items()} if averaging is not None else None
        )
    return found


def three() -> nn.Sequential:
    return nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(3)])


def estimate(model: nn.Module, batches: object, **options: object) -> RecalibrationReport:
    """Recalibrate without a bar."""
    return recalibrate(model, batches, progress=False, **options)  # type: ignore[arg-type]


def close(layer: nn.Module, mean: object, var: object, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(layer.running_mean.double(), torch.as_tensor(mean), rtol=rtol, atol=rtol)
    torch.testing.assert_close(layer.running_var.double(), torch.as_tensor(var), rtol=rtol, atol=rtol)
