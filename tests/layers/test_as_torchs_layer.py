"""The converted layer is torch's layer to everyone else: to who prunes, parametrizes, stops, stacks, moves or exports
it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import numpy as np
import oracles
import pytest
import torch
from settlements import AVERAGES, Record, agree, each_average, few_averages
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrize, prune

from lightning_bn import Averaging, BatchNorm1d, Cumulative, Exponential, Window, convert_batch_norm, settle_together
from lightning_bn.averaging import Batch


class SiLUNorm(nn.BatchNorm1d):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.silu(super().forward(input))


def network(norm: type[nn.BatchNorm1d] = nn.BatchNorm1d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), norm(4), nn.Linear(4, 4), norm(4))


def step(model: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)
    output: Tensor = model(torch.randn(8, 4) + seed)
    output.square().sum().backward()
    return output.detach()


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "bias", 0.5)


def parametrized(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", nn.Softplus())


def given(layer: nn.Module) -> None:
    """As a hypernetwork does."""
    del layer.weight
    layer.weight = torch.tensor([1.0, 2.0, -1.0, 0.5])


AFFINE = [pruned, parametrized, given]


@pytest.mark.parametrize("averaging", [None, Window(3), Exponential(0.1)], ids=str)
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, SiLUNorm])
@pytest.mark.parametrize("change", AFFINE)
@pytest.mark.parametrize("first", ["change", "convert"])
def test_any_weight_that_a_forward_uses(
    averaging: Averaging | None, norm: type[nn.BatchNorm1d], change: Callable[[nn.Module], None], first: str
) -> None:
    """Pruned, parametrized or a plain tensor, before or after the conversion: outputs and gradients are torch's."""
    theirs, ours = network(norm), network(norm)
    for model in (theirs, ours):
        torch.manual_seed(1)
        if first == "convert" and model is ours:
            convert_batch_norm(model, averaging)
        change(model[1])
        if first == "change" and model is ours:
            convert_batch_norm(model, averaging)
    for seed in range(4):
        assert torch.equal(step(ours, seed), step(theirs, seed))
    for expected, got in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert (expected.grad is None and got.grad is None) or torch.equal(expected.grad, got.grad)
    assert ours[1].num_batches_tracked == 4


def without_channels(model: nn.Sequential, keep: list[int]) -> None:
    """What structured pruning makes of the first two modules."""
    linear, norm, following = model[0], model[1], model[2]
    linear.weight, linear.bias = nn.Parameter(linear.weight.data[keep]), nn.Parameter(linear.bias.data[keep])
    following.weight = nn.Parameter(following.weight.data[:, keep])
    norm.weight, norm.bias = nn.Parameter(norm.weight.data[keep]), nn.Parameter(norm.bias.data[keep])
    norm.running_mean, norm.running_var = norm.running_mean[keep], norm.running_var[keep]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, SiLUNorm])
@pytest.mark.parametrize("says", [True, False], ids=["num_features too", "num_features stays"])
@few_averages
def test_channels_are_removed(name: str, says: bool, norm: type[nn.BatchNorm1d]) -> None:
    """Training goes on; a history of another size begins anew, said once, and the other layer's goes on."""
    averaging, oracle = AVERAGES[name]
    model = convert_batch_norm(network(norm), averaging)
    rest = Record(nn.Sequential(model[3]))
    step(model, 0)
    step(model, 1)
    without_channels(model, [0, 2, 3])
    if says:
        model[1].num_features = 3
    seen: list[oracles.Array] = []
    model[1].register_forward_pre_hook(lambda _, args: seen.append(oracles.channels(args[0])))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(2, 8):
            step(model, seed)
    assert len([each for each in caught if "begins anew" in str(each.message)]) == ("window" in name)
    if "window" in name:  # as long a window as there were batches since
        mean, var = oracle(seen)
        np.testing.assert_allclose(model[1].running_mean, mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(model[1].running_var, var, rtol=1e-5, atol=1e-5)
    if norm is nn.BatchNorm1d:
        agree(nn.Sequential(model[3]), rest, oracle)


@few_averages
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, SiLUNorm])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("part", [slice(0, 4), slice(1, 2)], ids=["the model", "a layer by itself"])
def test_the_first_forward_may_be_without_gradients(
    name: str, norm: type[nn.BatchNorm1d], mode: Callable[..., object], part: slice
) -> None:
    """A warm-up or a prediction with layers in train mode: training goes on, and the batches count."""
    model = convert_batch_norm(network(norm), AVERAGES[name][0])
    record = Record(model)
    with mode():
        model[part](torch.randn(8, 4))
        model[part](torch.randn(8, 4))
    for seed in range(4):
        step(model, seed)
    agree(model, record, AVERAGES[name][1])


@few_averages
def test_a_model_converted_in_inference_mode(name: str) -> None:
    """What the conversion makes outlives the mode."""
    model = network()
    with torch.inference_mode():
        convert_batch_norm(model, AVERAGES[name][0])
    record = Record(model)
    for seed in range(4):
        step(model, seed)
    agree(model, record, AVERAGES[name][1])


class Twice(nn.Module):
    """A layer that is called twice, between two that are called once; it may raise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.raises = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.shared(self.shared(self.first(x)) * 2) + 1)
        if self.raises:
            raise ValueError("no")
        return self.last(x)


@each_average
def test_a_forward_that_raises_leaves_everything(name: str) -> None:
    """Also after a layer ran a second and a third time; and where it does not raise, every call counts."""
    model = convert_batch_norm(Twice(), AVERAGES[name][0])
    for seed in range(2):
        step(model, seed)
    before = copy.deepcopy(model.state_dict())
    model.raises = True
    with pytest.raises(ValueError, match="no"):
        model(torch.randn(8, 4))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    model = convert_batch_norm(Twice(), AVERAGES[name][0])
    record = Record(model)
    for seed in range(6):
        step(model, seed)
    assert all(record.deferred)
    agree(model, record, AVERAGES[name][1])


@few_averages
def test_settling_together_in_the_middle_of_a_forward(name: str) -> None:
    """Loses no batch: neither of the layers that ran before it nor of those that run after it."""
    model = convert_batch_norm(network(), AVERAGES[name][0])
    record = Record(model)
    handle = model[2].register_forward_pre_hook(lambda *_: settle_together(model) and None)
    for seed in range(3):
        step(model, seed)
    handle.remove()
    step(model, 3)
    agree(model, record, AVERAGES[name][1])


@pytest.mark.parametrize("averaging", [Window(3), Exponential(0.3), Cumulative(pooled=True)], ids=str)
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, SiLUNorm])
@pytest.mark.parametrize("which", ["_forward_hooks", "_forward_pre_hooks"])
def test_hooks_cleared_by_somebody(averaging: Averaging, norm: type[nn.BatchNorm1d], which: str) -> None:
    """They are set again, with a warning, and no batch is missing; a subclass averages one by its own rule where it is
    found out after the forward."""
    model, expected = (convert_batch_norm(network(norm), averaging) for _ in range(2))
    for each in (model, expected):
        step(each, 0)
    for module in model.modules():
        getattr(module, which).clear()
    with pytest.warns(UserWarning, match="were removed by other code"):
        step(model, 1)
    step(expected, 1)
    for seed in range(2, 8):
        step(model, seed)
        step(expected, seed)
    assert model[1].num_batches_tracked == 8
    if norm is nn.BatchNorm1d or which == "_forward_hooks" or isinstance(averaging, Exponential):
        for key, value in expected.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], value)


@pytest.mark.parametrize(
    "averaging", [Window(3), Window(3, pooled=True), Cumulative(), Cumulative(pooled=True)], ids=str
)
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, SiLUNorm])
@pytest.mark.parametrize("alone", [False, True], ids=["in the model", "by itself"])
def test_momentum_zero_stops_every_average(averaging: Averaging, norm: type[nn.BatchNorm1d], alone: bool) -> None:
    """As it stops torch's; outputs stay those of training, and with its momentum back the average goes on."""
    model, expected = (convert_batch_norm(network(norm), averaging) for _ in range(2))
    for seed in range(4):
        step(model, seed)
        step(expected, seed)
    before = {name: value.clone() for name, value in model[1].state_dict().items()}
    momentum, model[1].momentum = model[1].momentum, 0.0
    for seed in range(4, 8):
        batch = torch.randn(8, 4) * seed
        outputs = [(each[1] if alone else each)(batch) for each in (model, copy.deepcopy(expected))]
        assert torch.equal(*outputs)
    for name, value in before.items():
        assert torch.equal(value, model[1].state_dict()[name]) or (norm is SiLUNorm and "tracked" in name)
    model[1].momentum = momentum
    batch = torch.randn(8, 4)
    for each in (model, expected):
        each[1](batch)
    assert torch.equal(model[1].running_mean, expected[1].running_mean)


def test_skip_nonfinite_set_after_the_first_forward() -> None:
    """It is asked in each forward."""
    model = convert_batch_norm(network(), Window(3))
    step(model, 0)
    model[1].skip_nonfinite = False
    model(torch.full((8, 4), torch.nan))
    assert model[1].running_mean.isnan().all()
    assert not model[3].running_mean.isnan().any()


@each_average
@pytest.mark.parametrize("history", [True, False], ids=["with its history", "a plain model's file"])
def test_made_on_meta_and_loaded_by_assignment(name: str, history: bool) -> None:
    """It trains on from the file; what the file has no history of begins as in any model."""
    averaging = AVERAGES[name][0]
    source = convert_batch_norm(network(), averaging) if history else network()
    for seed in range(3):
        step(source, seed)
    expected = convert_batch_norm(network(), averaging)
    expected.load_state_dict(source.state_dict())
    with torch.device("meta"):
        model = convert_batch_norm(network(), averaging)
    model.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    for seed in range(3, 9):
        for each in (model, expected):
            step(each, seed)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


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


@pytest.mark.parametrize("averaging", [None, Window(3), Cumulative(pooled=True), Exponential(0.1)], ids=str)
def test_export_in_training_mode(averaging: Averaging | None) -> None:
    """The program averages as that of torch's layer does, also where the layer has a history."""
    theirs, ours = network().train(), convert_batch_norm(network(), averaging).train()
    batch = torch.randn(8, 4)
    programs = [torch.export.export(model, (batch,)).module() for model in (theirs, ours)]
    outputs = [program(batch) for program in programs]
    torch.testing.assert_close(outputs[0], outputs[1])
    held = [dict(program.named_buffers()) for program in programs]
    for key, value in held[0].items():
        torch.testing.assert_close(held[1][key], value, msg=key)


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
