"""The converted layer is torch's layer to everyone else: to who prunes, parametrizes, stops, stacks, moves or exports
it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import numpy as np
import oracles
import pytest
import torch
from settlements import AVERAGES, Record, agree, each_average, few_averages, network, step
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_bn import (
    Averaging,
    BatchNorm1d,
    Cumulative,
    Exponential,
    Window,
    convert_batch_norm,
    settle_together,
    to_torch,
)
from lightning_bn.discovery import find_batch_norms
from lightning_bn.modes import held_in_eval


class SiLUNorm(nn.BatchNorm1d):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.silu(super().forward(input))


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


def frozen_for_a_while(model: nn.Module) -> nn.Module:
    with held_in_eval(layer.module for layer in find_batch_norms(model)):
        model.train()
    return model


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


def test_channels_removed_before_the_first_batch() -> None:
    """There is no history that could begin anew, and nothing is said."""
    layer = BatchNorm1d(4, averaging=Window(3))
    for name in ("weight", "bias"):
        setattr(layer, name, nn.Parameter(getattr(layer, name).data[:3]))
    layer.running_mean, layer.running_var, layer.num_features = layer.running_mean[:3], layer.running_var[:3], 3
    batch = torch.randn(8, 3)
    layer(batch)
    assert torch.allclose(layer.running_mean, batch.mean(0))


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


@few_averages
def test_converted_and_back_in_inference_mode_in_16_bits(name: str) -> None:
    """Statistics that get another dtype are ordinary tensors, with which training goes on."""
    model = network().to(torch.bfloat16)
    for change in (lambda model: convert_batch_norm(model, AVERAGES[name][0]), to_torch):
        with torch.inference_mode():
            change(model)
        assert not any(tensor.is_inference() for tensor in model.state_dict(keep_vars=True).values())
        model(torch.randn(8, 4, dtype=torch.bfloat16)).sum().backward()


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
    "way",
    [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), frozen_for_a_while],
    ids=["itself", "a copy", "a file", "frozen before"],
)
def test_all_hooks_cleared_by_somebody(way: Callable[[nn.Module], nn.Module]) -> None:
    """Those of the model and of a subclass: nothing of this package runs in the next forward. It is said wherever the
    mode changes, so before any evaluation, and then the window goes on."""
    model = convert_batch_norm(network(SiLUNorm), Window(3))
    step(model, 0)
    model = way(model)
    for module in model.modules():
        for which in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called"):
            getattr(module, which).clear()
    step(model, 1)
    with pytest.warns(UserWarning, match="were removed by other code"):
        model.eval()
    assert not any(module.training for module in model.modules())
    record = Record(model.train())
    for seed in range(2, 5):
        step(model, seed)
    mean, var = oracles.window(record.inputs["1"], 3, False)
    np.testing.assert_allclose(model[1].running_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(model[1].running_var.numpy(), var, rtol=1e-5)


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
