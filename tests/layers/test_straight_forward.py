"""The short way through a layer's forward sees what is new since its last one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from settlements import network, step
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_bn import Exponential, Window, convert_batch_norm

Norm = nn.BatchNorm1d


def _set(name: str, value: object) -> Callable[[Norm], None]:
    return lambda layer: setattr(layer, name, value)


MEDDLING: dict[str, Callable[[Norm], None]] = {
    "eval mode": lambda layer: layer.eval() and None,
    "no tracking": _set("track_running_stats", False),
    "eps": _set("eps", 0.5),
}


@pytest.mark.parametrize("name", MEDDLING)
def test_a_setting_that_changes_in_a_forward(name: str) -> None:
    """Of a later layer, set while an earlier one runs: outputs and statistics are torch's, bit for bit."""
    models = [network(), convert_batch_norm(network())]
    for model in models:
        for seed in range(3):
            step(model, seed)
        model[2].register_forward_hook(lambda *_, model=model: MEDDLING[name](model[3]))
    for seed in range(3, 6):
        expected, output = [step(model, seed) for model in models]
        assert torch.equal(output, expected)
    for key, value in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[key], value), key


def test_momentum_0_in_a_forward_stops_a_window() -> None:
    """At once, as in the forwards that follow; any other momentum counts from the next forward on."""
    model = convert_batch_norm(network(), Window(3))
    for seed in range(3):
        step(model, seed)
    before = copy.deepcopy(model[3].state_dict())
    model[2].register_forward_hook(lambda *_: setattr(model[3], "momentum", 0.0))
    for seed in range(3, 5):
        step(model, seed)
    for key, value in before.items():
        assert torch.equal(model[3].state_dict()[key], value), key


def test_a_function_mode_sees_each_layer() -> None:
    """As it sees torch's: by the name under which it may be overridden."""

    class Seen(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    model, seen = convert_batch_norm(network()), list[Any]()
    for seed in range(3):
        step(model, seed)
    with Seen():
        model(torch.randn(8, 4))
    assert seen.count(nn.functional.batch_norm) == 2


@pytest.mark.parametrize("averaging", [None, Exponential(0.1, debias=True), Window(3)])
def test_another_thread_in_the_middle_of_a_forward(averaging: Exponential | Window | None) -> None:
    """Its batch counts behind that of the forward, and neither is written over the other."""
    model = convert_batch_norm(network(), averaging)
    for seed in range(3):
        step(model, seed)
    alone = copy.deepcopy(model[3])
    other, own = torch.randn(8, 4) * 3, []

    def meddle(module: nn.Module, args: object, output: torch.Tensor) -> None:
        own.append(output.detach())
        thread = Thread(target=lambda: model[3](other))
        thread.start()
        thread.join()

    handle = model[2].register_forward_hook(meddle)
    step(model, 3)
    handle.remove()
    alone(own[0])
    alone(other)
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(model[3].state_dict()[key], value)
