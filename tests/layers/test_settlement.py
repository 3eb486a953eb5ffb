"""Layers that settle together at the end of their model's forward keep the statistics that each of them would keep by
itself."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from settlements import AVERAGES, Net, Record, agree, batches, each_average, few_averages, layers, net
from third_party import BatchNormAct2d
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lightning_bn import (
    Averaging,
    Batch,
    BatchNorm1d,
    BatchNorm2d,
    Exponential,
    Window,
    convert_batch_norm,
    paused_statistics,
    settle_together,
    to_torch,
)
from lightning_bn.layers.group import Group
from lightning_bn.layers.ledger import Ledger
from lightning_bn.layers.settlement import is_lent


@each_average
def test_every_average_is_the_oracles(name: str) -> None:
    """Layers of different widths, settled as one wide layer, each have the statistics of a naive loop over their own
    batches."""
    model = net(name)
    record = Record(model)
    for batch in batches(11):
        model(batch)
    assert all(record.lent)
    agree(model, record, AVERAGES[name][1])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda patch: patch.setattr(Group, "_valid", lambda *_: None),
        lambda patch: patch.setattr(Ledger, "end", lambda self: None),
        lambda patch: patch.setattr(Group, "finite", lambda self, var: torch.ones(len(self.layers), dtype=torch.bool)),
    ],
    ids=["masks nothing", "never settles", "takes NaN for finite"],
)
def test_oracle_goes_red(spoil: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above, of a run with a left-out part and a NaN, notices a ledger that is spoiled."""

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
    for layer in layers(theirs).values():
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
    """The same layers without a ledger, each settling at once, hold the same."""
    together, alone = net(name), net(name)
    for module in alone.modules():
        module._forward_pre_hooks.clear(), module._forward_hooks.clear(), module._forward_hooks_always_called.clear()
    records = [Record(model) for model in (together, alone)]
    for batch in batches():
        together(batch), alone(batch)
    assert all(records[0].lent)
    assert not any(records[1].lent)
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
    assert all(record.lent)
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
    assert all(record.lent)
    agree(step, record, AVERAGES[name][1])
    layer = step.model.body[1]
    tracked = int(layer.num_batches_tracked)
    layer(torch.randn(4, 3, 2, 2))
    assert layer.num_batches_tracked == tracked + 1
    assert not is_lent(layer)


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
    assert all(record.lent)
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


@few_averages
def test_functional_call(name: str) -> None:
    """The buffers that are passed in are moved, as torch's layers do it; the model's own are not."""
    model = net(name)
    expected = net(name)
    own = copy.deepcopy(dict(model.named_buffers()))
    passed = {key: value.clone() for key, value in (*model.named_parameters(), *model.named_buffers())}
    functional_call(model, passed, (batches()[0],))
    expected(batches()[0])
    for key, value in expected.named_buffers():
        assert torch.equal(passed[key], value), key
        assert torch.equal(dict(model.named_buffers())[key], own[key]), key


@each_average
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_the_model_trains_on_by_itself(name: str, way: Callable[[Net], Net]) -> None:
    """In the middle of its windows, with statistics to the bit, and neither of the two notices the other."""
    model = net(name)
    for batch in batches(4):
        model(batch)
    twin = way(model)
    record = Record(twin)
    untouched = copy.deepcopy(model.state_dict())
    for batch in batches()[4:]:
        twin(batch)
    assert all(record.lent)
    assert all(torch.equal(value, untouched[key]) for key, value in model.state_dict().items())
    for batch in batches()[4:]:
        model(batch)
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["window of 3", "pooled cumulative"])
def test_a_copy_of_one_layer_holds_that_layer_alone(name: str) -> None:
    """Its state is a part of the whole model's; a copy carries no more than its own, and goes on by itself."""
    model = net(name)
    for batch in batches(4):
        model(batch)
    layer = model.body[1]
    saved = io.BytesIO()
    torch.save(layer, saved)
    fresh = io.BytesIO()
    torch.save(BatchNorm2d(3, averaging=AVERAGES[name][0]), fresh)
    assert len(saved.getvalue()) < len(fresh.getvalue()) + 400
    for twin in (copy.deepcopy(layer), torch.load(io.BytesIO(saved.getvalue()), weights_only=False)):
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        assert all(torch.equal(value, twin.state_dict()[key]) for key, value in before.items())
        twin(torch.randn(4, 3, 2, 2))
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_a_copy_in_the_middle_of_a_forward() -> None:
    """A layer that is copied while it is lent rows has borrowed nothing."""
    model, copies = net("window of 3"), []
    model.body[2].register_forward_hook(
        lambda *_: copies.append((copy.deepcopy(model.body[1]), pickle.loads(pickle.dumps(model.body[4]))))
    )
    model(batches()[0])
    for layer in copies[0]:
        assert not is_lent(layer)
        layer(torch.randn(4, layer.num_features, 2, 2))
        assert layer.num_batches_tracked == 1


@each_average
@pytest.mark.parametrize("move", ["double", "half and back", "reload", "assign", "one layer"])
def test_moving_and_loading_in_mid_flight(name: str, move: str) -> None:
    """A tie that a cast, a load with assign=True or a change of one layer has broken is made anew; the history
    stays."""
    model = net(name)
    record = Record(model)
    for step, batch in enumerate(batches(10)):
        if step == 5:
            if move == "double":
                model.double()
            elif move == "half and back":
                kept = copy.deepcopy(model.state_dict())
                model.half().float()
                model.load_state_dict(
                    {key: value for key, value in kept.items() if "averaging" not in key}, strict=False
                )
                model.load_state_dict(kept)
            elif move == "one layer":
                model.body[1].double()
                model.body[1].float()
            else:
                other = net(name)
                other.load_state_dict(copy.deepcopy(model.state_dict()), assign=move == "assign")
                again = Record(other)
                again.inputs = record.inputs
                model = other
        model(batch.double() if move == "double" and step >= 5 else batch)
    agree(model, record, AVERAGES[name][1])


@few_averages
def test_built_on_meta(name: str) -> None:
    """A model that is converted on the meta device, then given memory and a state, trains like another."""
    usual = net(name)
    with torch.device("meta"):
        model = convert_batch_norm(Net(), AVERAGES[name][0])
    model(torch.empty(4, 2, 6, 6, device="meta"))
    model.to_empty(device="cpu").load_state_dict(usual.state_dict())
    record = Record(model)
    for batch in batches():
        model(batch)
    assert all(record.lent)
    agree(model, record, AVERAGES[name][1])


@few_averages
def test_compiled_whole(name: str) -> None:
    """The hooks are traced to nothing, without a break in the graph, and the compiled layers settle at once."""
    model = net(name)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for batch in batches(4):
        torch.testing.assert_close(compiled(batch), model(batch), rtol=1e-4, atol=1e-4)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value, rtol=1e-5, atol=1e-5, msg=key)


@few_averages
def test_a_compiled_part_in_an_eager_model(name: str) -> None:
    """What the eager layers are lent does not reach the compiled ones."""
    model = net(name)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    twin.body.compile(fullgraph=True, backend="aot_eager")
    for batch in batches(4):
        torch.testing.assert_close(twin(batch), model(batch), rtol=1e-4, atol=1e-4)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value, rtol=1e-5, atol=1e-5, msg=key)


@few_averages
def test_threads_that_share_a_model(name: str) -> None:
    """A forward that begins while another thread is in the middle of one loses no batch and takes none away."""
    model = net(name)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if threading.current_thread() is first:
            inside.set()
            go_on.wait(30)

    model.body[2].register_forward_hook(wait)
    first = threading.Thread(target=model, args=(batches()[0],))
    first.start()
    assert inside.wait(30)
    model(batches()[1])
    go_on.set()
    first.join()
    assert all(layer.num_batches_tracked == 2 for layer in layers(model).values())
    one_after_the_other = net(name)
    one_after_the_other(batches()[0]), one_after_the_other(batches()[1])
    for key, value in one_after_the_other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-5, atol=1e-5, msg=key)


@few_averages
def test_replicas_of_data_parallel(name: str) -> None:
    """A replica has the original's hooks and the same tensors, and runs in a thread of its own: what it is given
    counts, as in torch."""
    model = net(name)
    record = Record(model)
    for batch in batches():
        thread = threading.Thread(target=_replicated(model), args=(batch,))
        thread.start()
        thread.join()
    assert not any(record.lent)
    agree(model, record, AVERAGES[name][1])


def _replicated(module: nn.Module) -> nn.Module:
    """What `torch.nn.parallel.replicate` does for the first device: copies of the modules around the same tensors."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else _replicated(child)
    replica._parameters.update(module._parameters)
    return replica


@few_averages
def test_freezing_and_thawing(name: str) -> None:
    """Which layers train changes from step to step; each settles with those that do."""
    model = net(name)
    record = Record(model)
    for step, batch in enumerate(batches(12)):
        model.train()
        model.body.train(step % 4 != 1)
        model.head.train(step % 3 != 2)
        model(batch)
    agree(model, record, AVERAGES[name][1])


def test_a_layer_that_is_replaced_settles_by_itself_until_it_is_told() -> None:
    """A new layer is no part of the ledger, and is right all the same; settle_together takes it in."""
    model = net("window of 3")
    model.body[4] = BatchNorm2d(5, averaging=Window(3))
    record = Record(model)
    model(batches()[0])
    assert record.lent == [True, False, True, True]
    settle_together(settle_together(model))
    for batch in batches()[1:]:
        model(batch)
    assert all(record.lent[4:])
    assert sum(type(getattr(hook, "__self__", None)) is Ledger for hook in model._forward_pre_hooks.values()) == 1
    agree(model, record, AVERAGES["window of 3"][1])


def test_a_setting_that_changes_regroups() -> None:
    """A momentum assigned to one layer is that layer's alone, from the next batch on."""
    model = convert_batch_norm(Net(), Exponential(0.5, debias=True))
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module._forward_pre_hooks.clear(), module._forward_hooks.clear(), module._forward_hooks_always_called.clear()
    for step, batch in enumerate(batches()):
        for each in (model, twin):
            if step == 3:
                each.body[1].momentum = 0.9
            if step == 5:
                each.body[1].momentum = None
            each(batch)
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())


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
        assert all(record.lent)
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
    for name, layer in layers(model).items():
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
    """They keep their own forward, borrow rows from the ledger, and give theirs back to autograd."""
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
    assert all(record.lent)
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
