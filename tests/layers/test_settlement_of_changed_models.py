"""Layers settle rightly whatever is done to their model: called otherwise, copied, moved, compiled, shared, frozen."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from settlements import AVERAGES, Net, Record, agree, batches, each_average, few_averages, net
from states import norms
from torch import nn
from torch.func import functional_call

from lightning_bn import (
    BatchNorm2d,
    Exponential,
    Window,
    convert_batch_norm,
    settle_together,
)
from lightning_bn.layers.deferred import DeferredUpdates
from lightning_bn.layers.settlement import is_deferred


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
    assert all(record.deferred)
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
    """A layer that is copied in the middle of a forward has no scratch rows."""
    model, copies = net("window of 3"), []
    model.body[2].register_forward_hook(
        lambda *_: copies.append((copy.deepcopy(model.body[1]), pickle.loads(pickle.dumps(model.body[4]))))
    )
    model(batches()[0])
    for layer in copies[0]:
        assert not is_deferred(layer)
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
    assert all(record.deferred)
    agree(model, record, AVERAGES[name][1])


# What is traced is run as it is; test_compile_and_export.py has the compiler's later parts.
@few_averages
def test_compiled_whole(name: str) -> None:
    """The hooks are traced to nothing, without a break in the graph, and the compiled layers settle at once."""
    model = net(name)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    for batch in batches(4):
        torch.testing.assert_close(compiled(batch), model(batch), rtol=1e-4, atol=1e-4)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value, rtol=1e-5, atol=1e-5, msg=key)


@few_averages
def test_a_compiled_part_in_an_eager_model(name: str) -> None:
    """The eager layers' scratch rows do not reach the compiled ones."""
    model = net(name)
    twin = copy.deepcopy(model)
    twin.body.compile(fullgraph=True, backend="eager")
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
    assert all(layer.num_batches_tracked == 2 for layer in norms(model).values())
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
    assert not any(record.deferred)
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
    """A new layer has no deferred updates, and is right all the same; settle_together takes it in."""
    model = net("window of 3")
    model.body[4] = BatchNorm2d(5, averaging=Window(3))
    record = Record(model)
    model(batches()[0])
    assert record.deferred == [True, False, True, True]
    settle_together(settle_together(model))
    for batch in batches()[1:]:
        model(batch)
    assert all(record.deferred[4:])
    assert (
        sum(type(getattr(hook, "__self__", None)) is DeferredUpdates for hook in model._forward_pre_hooks.values()) == 1
    )
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
