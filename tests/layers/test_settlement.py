"""Layers that settle together at the end of their model's forward keep the statistics that each of them would keep by
itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from settlements import AVERAGES, Net, Record, agree, batches, each_average, few_averages, net
from states import norms
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bn import (
    convert_batch_norm,
    paused_statistics,
    settle_together,
    to_torch,
)
from lightning_bn.layers.deferred import DeferredUpdates
from lightning_bn.layers.group import LayerGroup
from lightning_bn.layers.settlement import is_deferred


@each_average
def test_every_average_is_the_oracles(name: str) -> None:
    """Layers of different widths, settled as one wide layer, each have the statistics of a naive loop over their own
    batches."""
    model = net(name)
    record = Record(model)
    for batch in batches(11):
        model(batch)
    assert all(record.deferred)
    agree(model, record, AVERAGES[name][1])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda patch: patch.setattr(LayerGroup, "_valid", lambda *_: None),
        lambda patch: patch.setattr(DeferredUpdates, "end", lambda self: None),
        lambda patch: patch.setattr(
            LayerGroup, "finite", lambda self, var: torch.ones(len(self.layers), dtype=torch.bool)
        ),
    ],
    ids=["masks nothing", "never settles", "takes NaN for finite"],
)
def test_oracle_goes_red(spoil: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above, of a run with a left-out part and a NaN, notices deferred updates that are spoiled."""

    spoil(monkeypatch)
    model = net("window of 3")
    record = Record(model)
    for step, batch in enumerate(batches()):
        model.use_side = step % 3 != 1
        batch[0, 0, 0, 0] = float("nan") if step == 4 else 0.0
        model(batch)
    with pytest.raises(AssertionError):
        agree(model, record, AVERAGES["window of 3"][1])


@pytest.mark.parametrize("momentum", [0.1, 0.7, 0.0, 1.0])
def test_plain_layers_are_torchs_to_the_bit(momentum: float) -> None:
    """With averaging=None, outputs, gradients and buffers are bit-identical to torch's own layers."""
    torch.manual_seed(0)
    theirs = Net()
    for layer in norms(theirs).values():
        layer.momentum = momentum
    ours = convert_batch_norm(copy.deepcopy(theirs))
    for batch in batches():
        outputs = [model(batch) for model in (theirs, ours)]
        assert torch.equal(*outputs)
        for output in outputs:
            output.square().sum().backward()
    for (key, one), other in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@each_average
def test_settled_together_or_alone_is_the_same_to_the_bit(name: str) -> None:
    """The same layers without deferred updates, each settling at once, hold the same."""
    together, alone = net(name), net(name)
    for module in alone.modules():
        module._forward_pre_hooks.clear(), module._forward_hooks.clear(), module._forward_hooks_always_called.clear()
    records = [Record(model) for model in (together, alone)]
    for batch in batches():
        together(batch), alone(batch)
    assert all(records[0].deferred)
    assert not any(records[1].deferred)
    for (key, one), other in zip(together.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(
            one, other, rtol=0 if "pooled" not in name else 1e-6, atol=0 if "pooled" not in name else 1e-6, msg=key
        )


@each_average
def test_a_nonfinite_batch_of_one_layer_is_skipped_by_that_one(name: str) -> None:
    """NaN that arises in the middle of the network leaves the layers before it untouched, and no trace in those
    behind."""
    model = net(name)
    record = Record(model)
    for step, batch in enumerate(batches()):
        factor = float("nan") if step in (0, 4, 5) else 1.0
        handle = model.body[2].register_forward_hook(lambda *args, factor=factor: args[-1] * factor)
        model(batch)
        handle.remove()
    assert len({len([b for b in inputs if np.isfinite(b).all()]) for inputs in record.inputs.values()}) == 2
    agree(model, record, AVERAGES[name][1])


@each_average
def test_layers_that_do_not_run_are_left_alone(name: str) -> None:
    """A part that only some forwards use counts those."""
    model = net(name)
    record = Record(model)
    for step, batch in enumerate(batches()):
        model.use_side = step % 3 == 1
        model(batch)
    agree(model, record, AVERAGES[name][1])


@each_average
def test_a_layer_called_twice_counts_twice(name: str) -> None:
    """In one forward, in the order of the calls, the layers between them once."""
    model = net(name)
    model.side = nn.Sequential(model.body[4], nn.Conv2d(5, 5, 1), model.body[4])
    record = Record(model)
    for batch in batches(5):
        model(batch)
    assert len(record.inputs["body.4"]) == 15
    assert all(record.deferred)
    agree(model, record, AVERAGES[name][1])


class Step(nn.Module):
    """A training step that calls parts of the model and not the model, as a LightningModule's does."""

    def __init__(self, model: Net) -> None:
        super().__init__()
        self.model = model

    def step(self, batch: Tensor) -> Tensor:
        return self.model.head(self.model.body(batch).mean((2, 3)))


@few_averages
def test_a_part_that_is_called_by_itself(name: str) -> None:
    """A part settles its layers together when it is called alone; a single layer, or an unknown part, settles at
    once."""
    step = Step(net(name))
    record = Record(step)
    for batch in batches():
        step.step(batch)
    assert not record.inputs["model.side.1"]
    del record.inputs["model.side.1"]
    del step.model.side
    # The head holds one layer alone, and is a part all the same.
    assert all(record.deferred)
    agree(step, record, AVERAGES[name][1])
    layer = step.model.body[1]
    tracked = int(layer.num_batches_tracked)
    layer(torch.randn(4, 3, 2, 2))
    assert layer.num_batches_tracked == tracked + 1
    assert not is_deferred(layer)


def test_in_the_middle_of_a_forward_statistics_are_those_before_the_batch() -> None:
    """What the docs say: code between two layers sees the running statistics as they were when the forward began."""
    model, seen = net("window of 3"), []
    model(batches()[0])
    before = model.body[1].running_mean.clone()
    model.body[2].register_forward_hook(lambda *_: seen.append(model.body[1].running_mean.clone()))
    model(batches()[1])
    assert torch.equal(seen[0], before)
    assert not torch.equal(model.body[1].running_mean, before)


@few_averages
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_raises_leaves_all_statistics(name: str, error: type[BaseException]) -> None:
    """Also an interrupt, of which no hook is told; the next forward, of the model or of a layer, counts as usual."""
    model = net(name)
    record = Record(model)
    model(batches()[0])
    before = copy.deepcopy(model.state_dict())

    def fail(*_: Any) -> None:
        raise error("in the middle")

    handle = model.body[3].register_forward_hook(fail)
    with pytest.raises(error):
        model(batches()[1])
    handle.remove()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    record.inputs["body.1"].pop()
    for batch in batches()[2:]:
        model(batch)
    assert all(record.deferred)
    agree(model, record, AVERAGES[name][1])
    model.body[3].register_forward_hook(fail)
    with pytest.raises(error):
        model(batches()[1])
    model.head(torch.randn(4, 5))
    assert model.head[1].num_batches_tracked == 9


@few_averages
def test_two_forwards_before_one_backward(name: str) -> None:
    """Gradients are torch's: the rows of the first forward are not written by the second."""
    model = net(name)
    theirs = to_torch(copy.deepcopy(model))
    for each in (model, theirs):
        (each(batches()[0]).square().sum() + each(batches()[1]).square().sum()).backward()
    for one, other in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


class Checkpointed(nn.Module):
    def __init__(self, model: Net, use_reentrant: bool) -> None:
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, batch: Tensor) -> Tensor:
        features = checkpoint(self.model.body, batch.requires_grad_(), use_reentrant=self.use_reentrant)
        return self.model.head(features.mean((2, 3)))


@few_averages
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_counts_once(name: str, use_reentrant: bool) -> None:
    """A part that runs again in backward does so on rows that nobody keeps; gradients are those without
    checkpointing."""
    plain, again = net(name), settle_together(Checkpointed(net(name), use_reentrant))
    plain.use_side = False
    for batch in batches(5):
        for model in (plain, again):
            model(batch.clone()).square().sum().backward()
    assert again.model.body[1].num_batches_tracked == 5
    for (key, one), other in zip(plain.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


@few_averages
def test_paused_statistics(name: str) -> None:
    """Around a whole forward, and around a part in the middle of one."""
    model = net(name)
    record = Record(model)
    model(batches()[0])
    with paused_statistics(model):
        model(batches()[1])

    class Paused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Tensor) -> Tensor:
            with paused_statistics(self.model.body):
                features = self.model.body(batch)
            return self.model.head(features.mean((2, 3)))

    settle_together(Paused())(batches()[2])
    assert [len(inputs) for inputs in record.inputs.values()] == [1, 1, 1, 2]
    agree(model, record, AVERAGES[name][1])
