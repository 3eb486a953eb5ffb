"""Layers that run another forward than their class's, and subclasses of other packages, in the conditions in which they
are used."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import torch.distributed as dist
from third_party import BatchNormAct2d
from torch import Tensor, nn

from lightning_bn import Averaging, BatchNorm2d, Cumulative, Exponential, Window, convert_batch_norm, to_torch
from lightning_bn.layers.subclasses import has_attached_averaging
from lightning_bn.ranks.synchronization import synchronise


def batches(count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 3, 2, 2, generator=generator) * 2 + step for step in range(count)]


def hook_like_accelerate(layer: nn.Module) -> None:
    """What accelerate's add_hook_to_module does: the old bound method on an attribute, a partial of the module in its
    place."""
    old: Callable[[Tensor], Tensor] = layer.forward
    layer._old_forward = old

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return module._old_forward(*args, **kwargs)

    layer.forward = functools.update_wrapper(functools.partial(forward, layer), old)


def patch_with_a_closure(layer: nn.Module) -> None:
    old = layer.forward
    layer.forward = lambda input: old(input) * 1.0


def rewrite(layer: nn.Module) -> None:
    layer.forward = lambda input: nn.functional.batch_norm(
        input, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.training, layer.momentum
    )


PATCHES = [hook_like_accelerate, patch_with_a_closure, rewrite]


@pytest.mark.parametrize(
    "averaging", [Window(3), Exponential(0.3, debias=True), Cumulative(pooled=True), Exponential(0.3)], ids=str
)
@pytest.mark.parametrize("patch", PATCHES)
def test_the_average_serves_a_patched_layer(patch: Callable[[nn.Module], None], averaging: Averaging) -> None:
    """By itself and in a model, whose forward it settles with; before 0.2 the average silently did nothing."""
    for wrap in (lambda layer: layer, lambda layer: nn.Sequential(nn.Identity(), layer)):
        layer, expected = nn.BatchNorm2d(3), BatchNorm2d(3, averaging=averaging)
        patch(layer)
        model = convert_batch_norm(wrap(layer), averaging)
        for batch in batches():
            torch.testing.assert_close(model(batch), expected(batch))
        torch.testing.assert_close(layer.running_mean, expected.running_mean)
        torch.testing.assert_close(layer.running_var, expected.running_var)
        assert layer.num_batches_tracked == 5


def test_a_patched_layer_that_cannot_be_served_is_refused_by_name() -> None:
    """A forward that leaves no moments in the layer's buffers can't get an average around it; the layer stays as it
    was."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    model[1].forward = lambda input: input * 2
    before = copy.deepcopy(model[1].state_dict())
    with pytest.raises(
        TypeError, match=r"1 \(BatchNorm2d\): its forward does not leave the batch's mean.*Nothing was changed"
    ):
        convert_batch_norm(model, Window(3))
    assert type(model[1]) is nn.BatchNorm2d
    assert all(torch.equal(value, before[key]) for key, value in model[1].state_dict().items())


@pytest.mark.parametrize("patch", PATCHES)
def test_trying_out_a_patched_layer_moves_nothing(patch: Callable[[nn.Module], None]) -> None:
    """Not the statistics, the mode or the RNG of the layer that is tried, even where a closure can't be copied."""
    layer = nn.BatchNorm2d(3)
    layer(batches()[0])
    layer.eval()
    patch(layer)
    before, state = {key: value.clone() for key, value in layer.state_dict().items()}, torch.get_rng_state()
    convert_batch_norm(layer, Window(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert not layer.training
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("patch", PATCHES)
def test_to_torch_leaves_a_layer_that_runs(patch: Callable[[nn.Module], None]) -> None:
    """Whether the forward was patched before the conversion or after it, and whoever still holds the old bound
    method."""
    for patch_first in (True, False):
        layer, plain = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        if patch_first:
            patch(layer)
        convert_batch_norm(layer, Window(3))
        if not patch_first:
            patch(layer)
        layer(batches()[0])
        to_torch(layer)
        plain.load_state_dict(layer.state_dict())
        for batch in batches():
            torch.testing.assert_close(layer(batch), plain(batch))
        assert torch.equal(layer.running_mean, plain.running_mean)


def test_converted_while_it_is_synchronised(tmp_path: Path) -> None:
    """A layer whose forward BatchNormSync has wrapped before gets the average too, and gives its forward back."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        layer = nn.BatchNorm2d(3)
        revert = synchronise(layer)
        convert_batch_norm(layer, Window(2))
        for batch in batches():
            layer(batch)
        revert()
    finally:
        dist.destroy_process_group()
    mean, var = oracles.window([oracles.channels(batch) for batch in batches()], 2, False)
    torch.testing.assert_close(layer.running_mean.double(), torch.tensor(mean), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), torch.tensor(var), rtol=1e-5, atol=1e-6)
    assert "forward" not in layer.__dict__


class Slow(BatchNormAct2d):
    """Lets another thread in, in the middle of its forward."""

    def forward(self, x: Tensor) -> Tensor:
        threading.Event().wait(0.002)
        return super().forward(x)


@pytest.mark.parametrize("averaging", [Window(4), Exponential(0.1)], ids=str)
def test_a_served_layer_in_several_threads(averaging: Averaging) -> None:
    """It keeps its momentum and its buffers, and counts every batch, as it would one after the other."""
    layer = convert_batch_norm(Slow(3), averaging)
    buffers = {name: id(buffer) for name, buffer in layer.named_buffers()}
    momentum = layer.momentum
    same = batches(1)[0]
    threads = [threading.Thread(target=lambda: [layer(same) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert layer.momentum == momentum
    assert {name: id(buffer) for name, buffer in layer.named_buffers()} == buffers
    assert layer.num_batches_tracked == 20
    alone = convert_batch_norm(BatchNormAct2d(3), averaging)
    for _ in range(20):
        alone(same)
    torch.testing.assert_close(layer.running_mean, alone.running_mean)


@pytest.mark.parametrize("averaging", [Window(4), Exponential(0.1)], ids=str)
def test_a_served_layer_after_an_interrupt(averaging: Averaging) -> None:
    """An interrupt in the middle of its forward leaves it with scratch buffers, until it is called again: then its own
    come back."""
    layer = convert_batch_norm(BatchNormAct2d(3), averaging)
    layer(batches()[0])
    buffers = dict(layer.named_buffers())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = layer.act.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        layer(batches()[1])
    handle.remove()
    layer(batches()[2])
    assert all(buffer is buffers[name] for name, buffer in layer.named_buffers())
    assert layer.num_batches_tracked == 2
    expected = BatchNorm2d(3, averaging=averaging)
    expected(batches()[0]), expected(batches()[2])
    torch.testing.assert_close(layer.running_mean, expected.running_mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("averaging", [Exponential(0.01), Exponential(0.01, debias=True), Window(200)], ids=str)
def test_statistics_of_a_served_layer_stay_wide_in_a_16_bit_model(averaging: Averaging, dtype: torch.dtype) -> None:
    """However it came to be 16 bits, and after a copy: 250 updates of 0.01 from 0 towards 5 arrive at 4.59; bfloat16
    stops at 3.4."""
    batch = (torch.full((2, 1, 1, 1), 5.0) + torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1)).to(dtype)
    expected = BatchNorm2d(1, averaging=averaging)
    for _ in range(250):
        expected(batch.float())
    cast = convert_batch_norm(nn.Sequential(BatchNormAct2d(1)), averaging).to(dtype)
    for model in (
        cast,
        convert_batch_norm(nn.Sequential(BatchNormAct2d(1).to(dtype)), averaging),
        copy.deepcopy(cast),
        _pickled(cast),
    ):
        layer = model[0]
        assert has_attached_averaging(layer)
        for _ in range(250):
            assert model(batch).dtype == dtype
        assert layer.weight.dtype == dtype
        assert layer.running_mean.dtype == torch.float32
        torch.testing.assert_close(layer.running_mean, expected.running_mean, rtol=1e-4, atol=1e-4)
        model(batch).float().sum().backward()
        assert layer.weight.grad is not None
        assert layer.eval()(batch).dtype == dtype
        assert to_torch(model)[0].running_mean.dtype == dtype


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]
