"""A converted layer with tensors of somebody else's: buffers given or replaced, transforms of torch.func."""

from __future__ import annotations

import copy

import pytest
import torch
from settlements import AVERAGES, each_average, network, step
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from lightning_bn import Averaging, BatchNorm1d, Cumulative, Exponential, Window, convert_batch_norm
from lightning_bn.averaging import Batch


def tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return (
        {name: each.detach().clone() for name, each in model.named_parameters()},
        {name: each.clone() for name, each in model.named_buffers()},
    )


@each_average
def test_two_sets_of_buffers_through_one_module(name: str) -> None:
    """Each has the history of its own batches, and so has the module itself."""
    averaging = AVERAGES[name][0]
    model = convert_batch_norm(network(), averaging)
    alone = [convert_batch_norm(network(), averaging) for _ in range(3)]
    sets = [tensors(model) for _ in range(2)]
    for _ in range(6):
        for number in (0, 1, 2):
            batch = torch.randn(8, 4) * (number + 1) + 5 * number
            if number < 2:
                functional_call(model, sets[number], (batch,))
            else:
                model(batch)
            alone[number](batch)
    buffers = [*(each for _, each in sets), dict(model.named_buffers())]
    for got, expected in zip(buffers, alone, strict=True):
        for key, value in expected.named_buffers():
            torch.testing.assert_close(got[key], value, rtol=0, atol=0, msg=f"{key} of {name}")


@each_average
def test_a_set_of_buffers_after_a_load(name: str) -> None:
    """A history that was loaded is the module's own, and not that of buffers which are passed in next."""
    averaging = AVERAGES[name][0]
    model, alone = (convert_batch_norm(network(), averaging) for _ in range(2))
    for seed in range(4):
        step(model, seed)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    passed = tensors(convert_batch_norm(network(), averaging))
    expected = copy.deepcopy(model)
    for seed in range(4, 8):
        batch = torch.randn(8, 4) + seed
        model(batch)
        functional_call(model, passed, (2 * batch,))
        expected(batch)
        alone(2 * batch)
    for buffers, each in ((dict(model.named_buffers()), expected), (passed[1], alone)):
        for key, value in each.named_buffers():
            assert torch.equal(buffers[key], value), key


def test_buffers_that_are_replaced_keep_the_history() -> None:
    """A tensor assigned in the place of a buffer that is gone goes on with its average."""
    model, expected = (convert_batch_norm(network(), Window(3)) for _ in range(2))
    for seed in range(6):
        for each in (model, expected):
            step(each, seed)
        model[1].running_mean = model[1].running_mean.clone()
    assert torch.equal(model[1].running_mean, expected[1].running_mean)


def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], model: nn.Module, batch: Tensor) -> Tensor:
    output: Tensor = functional_call(model, (parameters, buffers), (batch,))
    return output.square().mean()


@pytest.mark.parametrize("averaging", [None, Exponential(0.1), Exponential(0.1, debias=True), Cumulative()], ids=str)
def test_transforms_of_torch_func(averaging: Averaging | None) -> None:
    """`grad` again and again, and `vmap` over stacked models: gradients and statistics are those of plain forwards."""
    model = convert_batch_norm(network(), averaging)
    batches = [torch.randn(8, 4) for _ in range(3)]
    expected = copy.deepcopy(model)
    parameters, buffers = tensors(model)
    for batch in batches:
        gradients = grad(loss)(parameters, buffers, model, batch)
        expected.zero_grad()
        expected(batch).square().mean().backward()
        for name, parameter in expected.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad)
    for key, value in expected.named_buffers():
        torch.testing.assert_close(buffers[key], value)
    models = [copy.deepcopy(model) for _ in range(2)]
    stacked = stack_module_state(models)
    for batch in batches:
        outputs = vmap(lambda p, b, batch=batch: functional_call(model, (p, b), (batch,)))(*stacked)
        for output, each in zip(outputs, models, strict=True):
            torch.testing.assert_close(output, each(batch))
    for key, value in models[0].named_buffers():
        torch.testing.assert_close(stacked[1][key][0], value)


@pytest.mark.parametrize("averaging", [Window(3), Cumulative(pooled=True)], ids=str)
def test_a_history_is_refused_in_a_transform(averaging: Averaging) -> None:
    """By name, and nothing of it has changed."""
    model = convert_batch_norm(network(), averaging)
    step(model, 0)
    before = copy.deepcopy(model.state_dict())
    parameters, buffers = tensors(model)
    with pytest.raises(RuntimeError, match=r"(Window|Cumulative).*torch.func"):
        grad(loss)(parameters, buffers, model, torch.randn(8, 4))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    step(model, 1)
    assert model[1].num_batches_tracked == 2


class Kept(Averaging):
    """A user's own rule, with a state that is not a channel's."""

    def initial_state(self, num_features: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {"sum": torch.zeros((), dtype=dtype, device=device)}

    def update(self, running_mean: Tensor, running_var: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        batch.write(self.sum, self.sum + batch.mean.mean())
        return batch.mean, batch.var


def test_a_rule_of_ones_own_follows_its_set() -> None:
    """Its state is kept apart too, though it is none of the package's."""
    layer = BatchNorm1d(4, averaging=Kept())
    other = {name: value.clone() for name, value in layer.named_buffers()}
    batches = [torch.randn(8, 4) + t for t in range(4)]
    for batch in batches:
        layer(batch)
        functional_call(layer, other, (batch * 2,))
    functional_call(layer, other, (batches[0],))
    layer(batches[0])
    expected = sum(batch.mean() for batch in batches) + batches[0].mean()
    torch.testing.assert_close(layer.averaging.sum, expected)
