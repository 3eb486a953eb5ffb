"""Settlement with averagings of a user's, masks, and layers of other packages."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from settlements import AVERAGES, Net, Record, agree, batches, each_average, few_averages, net
from states import norms
from third_party import BatchNormAct2d
from torch import Tensor, nn

from lightning_bn import (
    Averaging,
    Batch,
    BatchNorm1d,
    Exponential,
    convert_batch_norm,
    settle_together,
)


class Median(Averaging):
    """A rule that treats each channel by itself: the running value moves a fixed way towards the batch's."""

    def __init__(self, way: float = 0.1) -> None:
        super().__init__()
        self.way = way

    def initial_state(self, num_features: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {"steps": torch.zeros(num_features, dtype=dtype, device=device)}

    def update(self, running_mean: Tensor, running_var: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        batch.write(self.steps, self.steps + batch.count / batch.count)
        return running_mean + self.way * (batch.mean - running_mean).sign() * self.steps.clamp(max=3), running_var


class ElementwiseMedian(Median):
    elementwise = True


def test_a_rule_of_a_users_in_both_forms() -> None:
    """Called for all layers at once, or for each by itself, it gives the same; what it needs is saved and goes on."""
    runs = []
    for averaging in (Median(), ElementwiseMedian()):
        torch.manual_seed(0)
        model = convert_batch_norm(Net(), averaging)
        record = Record(model)
        for step, batch in enumerate(batches()):
            model.use_side = step != 3
            model(batch)
            if step == 5:
                state = {key: value for key, value in model.state_dict().items() if "state_of" not in key}
                torch.manual_seed(0)
                model = convert_batch_norm(Net(), averaging)
                model.load_state_dict(state)
        assert all(record.deferred)
        runs.append(model.state_dict())
    for (key, one), other in zip(runs[0].items(), runs[1].values(), strict=True):
        if "state_of" not in key:
            assert torch.equal(one, other), key


def test_a_rule_that_averages_over_channels_is_called_layer_by_layer() -> None:
    """Which is why being elementwise is never guessed: settled as one wide layer it would mix the layers."""

    class MeanOfLayer(Averaging):
        def update(self, running_mean: Tensor, running_var: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
            return batch.mean.mean().expand_as(batch.mean), batch.var

    model = convert_batch_norm(Net(), MeanOfLayer())
    record = Record(model)
    model(batches()[0])
    for name, layer in norms(model).items():
        expected = oracles.window(record.inputs[name], 1, False)[0].mean()
        torch.testing.assert_close(
            layer.running_mean.double(), torch.full_like(layer.running_mean, expected).double(), rtol=1e-5, atol=1e-6
        )


def test_mistakes_of_an_elementwise_rule() -> None:
    """State without the channels last, and state that is assigned in place of written, are told at once."""

    class Scalar(Averaging):
        elementwise = True

        def initial_state(self, num_features: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
            return {"total": torch.zeros(2, dtype=dtype, device=device)}

        def update(self, running_mean: Tensor, running_var: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
            return batch.mean, batch.var

    with pytest.raises(
        ValueError, match=r"Scalar.* is elementwise, but its initial_state\(3, \.\.\.\) returns 'total' of shape \(2,\)"
    ):
        BatchNorm1d(3, averaging=Scalar())

    class Assigns(ElementwiseMedian):
        def update(self, running_mean: Tensor, running_var: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
            self.steps = self.steps + 1
            return batch.mean, batch.var

    model = convert_batch_norm(Net(), Assigns())
    with pytest.raises(TypeError, match=r"Assigns\.update assigns self\.steps.*batch\.write\(self\.steps, value\)"):
        model(batches()[0])


class MaskedNet(nn.Module):
    def __init__(self, averaging: Averaging | None) -> None:
        super().__init__()
        self.first, self.second = BatchNorm1d(3, averaging=averaging), BatchNorm1d(3, averaging=averaging)

    def forward(self, batch: Tensor, mask: Tensor) -> Tensor:
        return self.second(self.first(batch, mask).tanh() + batch)


@each_average
def test_masks(name: str) -> None:
    """A masked layer and another in one model: the one averages its valid positions, the other all."""
    averaging, oracle = AVERAGES[name]
    model = settle_together(MaskedNet(averaging))
    first, second = [], []
    model.second.register_forward_pre_hook(lambda _, args: second.append(oracles.channels(args[0])))
    generator = torch.Generator().manual_seed(1)
    for step in range(7):
        batch = torch.randn(4, 3, 5, generator=generator) + step
        mask = torch.rand(4, 5, generator=generator) > 0.3
        if step == 3:
            mask[:] = False
            mask[0, 0] = True
        else:
            first.append(np.moveaxis(batch.double().numpy(), 1, -1)[mask.numpy()])
        model(batch, mask)
    if "pooled exponential" not in name:  # its oracle takes batches of one size
        for buffer, expected in zip((model.first.running_mean, model.first.running_var), oracle(first), strict=True):
            np.testing.assert_allclose(buffer.double().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert model.first.num_batches_tracked == 6
    for buffer, expected in zip((model.second.running_mean, model.second.running_var), oracle(second), strict=True):
        np.testing.assert_allclose(buffer.double().numpy(), expected, rtol=1e-5, atol=1e-5)


@each_average
def test_subclasses_of_other_packages(name: str) -> None:
    """They keep their own forward, run on scratch rows, and leave theirs to autograd."""
    torch.manual_seed(0)
    averaging, oracle = AVERAGES[name]
    model = convert_batch_norm(
        nn.Sequential(nn.Conv2d(2, 3, 1), BatchNormAct2d(3), nn.Conv2d(3, 4, 1), BatchNormAct2d(4)),
        averaging or Exponential(0.1),
    )
    plain = nn.Sequential(nn.Conv2d(2, 3, 1), BatchNormAct2d(3), nn.Conv2d(3, 4, 1), BatchNormAct2d(4))
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "averaging" not in key})
    record = Record(model)
    for batch in batches():
        for each in (model, plain):
            each(batch).square().sum().backward()
    assert all(record.deferred)
    agree(model, record, oracle)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@few_averages
def test_what_is_written_into_a_layer_that_does_not_run_stays(name: str) -> None:
    """A forward that resets a layer which it then leaves out, as code that adapts to a domain may, finds it reset."""
    model = net(name)
    model(batches(1)[0])

    def reset(module: nn.Module, args: object) -> None:
        model.side[1].reset_running_stats()

    model.use_side = False
    model.head.register_forward_pre_hook(reset)
    model(batches(2)[1])
    assert model.side[1].num_batches_tracked == 0
    assert torch.equal(model.side[1].running_mean, torch.zeros(5))
    assert torch.equal(model.side[1].running_var, torch.ones(5))


class Counting(Averaging):
    """The mean of the batches, written with what a rule may ask a batch for and may change in one."""

    elementwise = True

    def update(self, running_mean: Tensor, running_var: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        shifted = dataclasses.replace(batch, mean=batch.mean + 0 * batch.count)
        assert shifted.step.shape == shifted.count.shape == batch.mean.shape
        return running_mean.lerp(shifted.mean, 1 / shifted.step), running_var.lerp(shifted.var, 1 / batch.step)


def test_a_rule_may_replace_fields_of_a_batch() -> None:
    """The batch that an elementwise rule of a user's gets is a `Batch` like any other."""
    model = convert_batch_norm(Net(), Counting())
    record = Record(model)
    for batch in batches():
        model(batch)
    agree(model, record, AVERAGES["cumulative"][1])
