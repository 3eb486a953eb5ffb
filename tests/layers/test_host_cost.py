"""What a training step costs the host, in operations, and that nothing on its path waits for a device.

On the meta device tensors have no values, so code that asks for one, as `.item()` does, raises there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_bn import (
    Averaging,
    Cumulative,
    Exponential,
    ModeCheck,
    Window,
    convert_batch_norm,
)
from lightning_bn.activations.collector import LayerCollector
from lightning_bn.activations.watched_layers import select_layers
from lightning_bn.comparison.followers import Followers
from lightning_bn.rules.arguments import Setting
from lightning_bn.rules.inspection import Inspection

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
from interpreted import count_python
from operations import Operations, count_operations, on_meta, operations_a_further_layer, peak_memory
from resnet import resnet50
from turns import training_step

AVERAGES: dict[str, Averaging | None] = {
    "None": None,
    "Exponential": Exponential(0.1),
    "Exponential, debias": Exponential(0.1, debias=True),
    "Exponential, pooled": Exponential(0.1, pooled=True),
    "Cumulative": Cumulative(),
    "Cumulative, pooled": Cumulative(pooled=True),
    "Window": Window(20),
    "Window, pooled": Window(20, pooled=True),
}
every_average = pytest.mark.parametrize("averaging", AVERAGES.values(), ids=AVERAGES)


def network() -> nn.Sequential:
    """Return three batch norms and two ReLUs on the meta device, in training."""
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(first, second, nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8)).to("meta").train()


def step_of(model: nn.Module) -> Callable[[], None]:
    """Return a forward and backward of 32 images of 3x8x8 on the meta device."""
    return on_meta(model, 32, 3, 8, 8)


@pytest.fixture(scope="module")
def torch_operations() -> int:
    """What a step of the ResNet launches with torch's layers."""
    return count_operations(on_meta(resnet50(16), 2, 3, 32, 32))


def test_every_operation_is_counted() -> None:
    """Forward and backward, views and writes in place, each once."""
    x = torch.ones(3, requires_grad=True)
    with Operations() as seen:
        (x.view(1, 3) * 2).sum().backward()
    names = [operation._schema.name.removeprefix("aten::") for operation in seen.calls.elements()]
    # Forward: view, mul, sum; backward: one that fills with 1, expand, mul, view, detach of the gradient.
    assert sorted(set(names) - {"detach"}) == ["expand", "mul", "ones_like", "sum", "view"]
    assert names.count("mul") == names.count("view") == 2


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_of_memory_is_of_what_lives_at_one_time(device: str) -> None:
    """Of four tensors of 400 bytes three live at once; a view takes nothing, nor does a write in place."""
    x = torch.ones(100, device=device)

    def step() -> None:
        first = x + 1
        second = first * 2
        third = second.view(10, 10).exp().add_(1)
        del first, second
        third.exp()

    assert peak_memory(step) == 3 * 400


@every_average
def test_a_step_launches_hardly_more_than_torchs(averaging: Averaging | None, torch_operations: int) -> None:
    """At most 1.25 times the operations, in a ResNet of 52 batch norms."""
    step = on_meta(convert_batch_norm(resnet50(16), averaging), 2, 3, 32, 32)
    step()  # a first forward may set things up
    assert count_operations(step) <= 1.25 * torch_operations


def python_of(averaging: Averaging | None, *, converted: bool = True) -> tuple[int, int]:
    """Return the Python calls and bytecodes of a forward, backward and SGD of 52 batch norms."""
    model = convert_batch_norm(resnet50(4), averaging) if converted else resnet50(4)
    step = training_step(model, "cpu", torch.randn(2, 3, 32, 32))
    for _ in range(4):  # the first forwards set things up
        step()
    return count_python(step)


def test_every_python_call_and_bytecode_is_counted() -> None:
    """A function's entry once, a generator's each time that it goes on, what runs in C never."""

    def twice() -> list[int]:
        return [abs(number) for number in pair()]

    def pair() -> Iterator[int]:
        yield 1
        yield 2

    calls, bytecodes = count_python(twice)
    inlined = sys.version_info >= (3, 12)  # a comprehension is no function there
    assert calls == 1 + (not inlined) + 3
    assert bytecodes > calls
    assert count_python(lambda: list(map(abs, [1, 2])))[0] == 1


@every_average
def test_a_step_runs_less_python_than_torchs(averaging: Averaging | None) -> None:
    """At most 1,200 calls and 47,000 bytecodes in 52 layers, where torch's layers have 1,487 and 50,642 (Python 3.11,
    torch 2.13), or as much less than torch's where another version of either counts otherwise."""
    calls, bytecodes = python_of(averaging)
    torchs_calls, torchs_bytecodes = python_of(None, converted=False)
    assert calls <= torchs_calls * 1200 / 1487
    assert bytecodes <= torchs_bytecodes * 47000 / 50642


@every_average
def test_a_further_layer_launches_what_torchs_layer_does(averaging: Averaging | None) -> None:
    """At most one operation more for two layers."""
    ours = operations_a_further_layer(lambda model: convert_batch_norm(model, averaging))
    assert ours - operations_a_further_layer(lambda model: model) <= 0.5


@every_average
def test_a_step_of_layers_waits_for_no_device(averaging: Averaging | None) -> None:
    """No value is asked for while the layers train, not in the first step either, nor when a window of 3 turns over."""
    averaging = Window(3, pooled=averaging.pooled) if isinstance(averaging, Window) else averaging
    step = step_of(convert_batch_norm(network(), averaging))
    for _ in range(7):
        step()


@pytest.mark.parametrize("averaging", [None, Window(3)], ids=["torch's layers", "converted"])
def test_followers_wait_for_no_device(averaging: Averaging | None) -> None:
    """Nor do the averages that `CompareAverages` follows, of torch's layers and of converted ones."""
    model = network() if averaging is None else convert_batch_norm(network(), averaging)
    followers = Followers(model, {name: each for name, each in AVERAGES.items() if each is not None})
    step = step_of(model)
    with followers.following():
        for _ in range(7):
            step()


@every_average
def test_mode_check_waits_for_no_device_between_looks(averaging: Averaging | None) -> None:
    """ModeCheck's hooks and what it judges at each batch read no value; an epoch's end may."""
    model = convert_batch_norm(network(), averaging)
    inspection = Inspection(model, Setting(caller=ModeCheck.__name__))
    step = step_of(model)
    inspection.attach([model])
    try:
        inspection.begin_epoch()
        for index in range(12):
            inspection.begin_batch("train", index, index)
            step()
            inspection.end_batch()
        assert not inspection.new()
    finally:
        inspection.close()


@every_average
@pytest.mark.parametrize("gradients", [False, True], ids=["activations", "gradients too"])
def test_a_sample_waits_for_no_device_until_it_is_collected(averaging: Averaging | None, gradients: bool) -> None:
    """The monitor's hooks read no value of the device; the one transfer is that of `collect`."""
    model = convert_batch_norm(network(), averaging)
    collector = LayerCollector(model, select_layers(model), gradients=gradients)
    step = step_of(model)
    for _ in range(3):
        collector.attach()
        step()
        collector.detach()
    assert not collector.unseen()


def test_meta_device_tells_who_asks_for_a_value() -> None:
    """What the tests above rest on: a layer that reads its count on the host raises there."""
    layer = nn.BatchNorm1d(2, momentum=None, device="meta")  # torch's own cumulative average waits for the device
    with pytest.raises(RuntimeError, match="meta tensors"):
        layer(torch.empty(4, 2, device="meta"))
