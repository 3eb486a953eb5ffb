"""Files, copies and casts of a network with several sets of statistics."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import oracles
import pytest
import safetensors.torch
import torch
from small_sets import LAYERS, NAMES, Whole, assert_same, batches, loss, network, statistics, statistics_of, train
from torch import nn

from lightning_bn import StatisticsSets, Window, convert_batch_norm, to_torch
from lightning_bn.checkpoints.health import inspect_checkpoint


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("saved_in", ["clean", ""])
@pytest.mark.parametrize("assign", [False, True])
def test_files_hold_every_set(layers: str, affine: bool, saved_in: str, assign: bool) -> None:
    """Whatever set is in place when a state is saved and when it is loaded, each set is itself afterwards, history
    included, and trains on to the same statistics."""
    whole, fresh = Whole(affine=affine, layers=layers), Whole(affine=affine, layers=layers)
    train(whole)
    with whole.sets.use(saved_in):
        state = copy.deepcopy(whole.state_dict())
    with fresh.sets.use("width=0.5"):
        fresh.load_state_dict(state, assign=assign)
    data = batches(3)
    for each in (whole, fresh):
        train(each, data)
    for name in NAMES:
        assert_same(whole.sets.state_dict(name), fresh.sets.state_dict(name))


def test_state_of_one_set_is_that_of_a_plain_model() -> None:
    """`sets.state_dict(name)` loads under strict=True into a network without sets, which then computes the same; the
    state of such a network loads into one set, and changes no other set's statistics."""
    whole, plain = Whole(affine=True), network()
    train(whole)
    plain.load_state_dict(whole.sets.state_dict(""))
    batch = batches(1)[0]
    with whole.sets.use(""):
        assert torch.equal(whole.eval().net(batch), plain.eval()(batch))
    others = {name: statistics_of(whole, name) for name in NAMES}
    plain.train()(batch * 3)
    with whole.sets.use("width=0.5"):
        whole.net.load_state_dict(plain.state_dict())
    assert_same(statistics_of(whole, "width=0.5"), statistics(plain))
    for name in ("clean", ""):
        assert_same(statistics_of(whole, name), others[name])


def test_the_sets_may_be_a_part_of_the_model() -> None:
    """`StatisticsSets(self, ...)` inside of the module itself: a set's state is then without the sets."""

    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.sets = StatisticsSets(self, ["a", "b"])

    model = Self()
    assert set(model.sets.state_dict("b")) == {f"net.{key}" for key in network().state_dict()}
    again = Self()
    again.load_state_dict(model.state_dict())


def test_safetensors_takes_the_state() -> None:
    """No two entries of a state share memory."""
    whole = Whole(affine=True)
    assert len(safetensors.torch.save(whole.state_dict())) > 0


@pytest.mark.parametrize("in_place", NAMES)
@pytest.mark.parametrize("affine", [False, True])
def test_inspect_lists_each_set_once(tmp_path: Path, affine: bool, in_place: str) -> None:
    """A layer of a file is listed for each set, with what that set holds, NaN too; the set in place as the model's own
    layer. Whatever differs from it is no copy."""
    whole = Whole(affine=affine)
    keys = dict(zip(NAMES, ["set=clean", "set=width=0%2E5", "set="], strict=True))
    for number, name in enumerate(NAMES):
        with whole.sets.use(name):
            for batch in batches(number):
                whole.net(batch)
            if not number:
                whole.net[1].running_mean[0] = torch.nan
    with whole.sets.use(in_place):
        state = whole.state_dict()
    torch.save(state, tmp_path / "sets.pt")
    expected = {f"sets.{key}.{path}": NAMES.index(name) for name, key in keys.items() for path in ("1", "3.1")}
    for path in ("1", "3.1"):
        expected[f"net.{path}"] = expected.pop(f"sets.{keys[in_place]}.{path}")
    layers = {layer.name: layer.batches_tracked for layer in inspect_checkpoint(tmp_path / "sets.pt").layers}
    assert layers == expected
    for name in ("running_var", "num_batches_tracked"):
        torch.save({**state, f"net.1.{name}": state[f"net.1.{name}"] + 1}, tmp_path / "sets.pt")
        assert len(inspect_checkpoint(tmp_path / "sets.pt").layers) == 8


@pytest.mark.parametrize("cast", ["half", "double", "bfloat16"])
@pytest.mark.parametrize("layers", ["torch", "window"])
def test_casts_reach_every_set(layers: str, cast: str) -> None:
    """Also while one of them is in use; with an averaging statistics stay in float32 where the model has 16 bits."""
    whole, plain = Whole(affine=True, layers=layers), LAYERS[layers](network())
    with whole.sets.use(""):
        getattr(whole, cast)()
    getattr(plain, cast)()
    for name in NAMES:
        with whole.sets.use(name):
            for key, value in plain.state_dict().items():
                assert whole.net.state_dict()[key].dtype == value.dtype, (name, key)


def test_copies_are_models_of_their_own() -> None:
    """A copy or a pickle of the whole has its own sets; a copy of the network alone has the set in place, and no
    others."""
    whole = Whole(affine=True)
    train(whole)
    expected = {name: whole.sets.state_dict(name) for name in NAMES}
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(whole), torch.load(buffer, weights_only=False)):
        train(twin)
        with twin.sets.use(""):
            assert twin.sets.active == ""
            assert whole.sets.active == "clean"
    for name in NAMES:
        assert_same(whole.sets.state_dict(name), expected[name])
    with whole.sets.use(""):
        alone = copy.deepcopy(whole.net)
    assert_same(alone.state_dict(), expected[""])
    StatisticsSets(alone, ["x", "y"])


@pytest.mark.parametrize("way", [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))], ids=["copy", "file"])
def test_a_copy_made_inside_of_use_has_that_set_in_place(way: Callable[[Whole], Whole]) -> None:
    """As the copy of a layer has: it answers as the model does at that moment, and has every set."""
    whole = Whole(affine=True)
    train(whole)
    inputs = batches(1)[0]
    with whole.sets.use(""):
        twin, expected = way(whole), whole.eval().net(inputs)
    assert (whole.sets.active, twin.sets.active) == ("clean", "")
    assert torch.equal(twin.eval().net(inputs), expected)
    for name in NAMES:
        with twin.sets.use(name), whole.sets.use(name):
            assert torch.equal(twin.net(inputs), whole.net(inputs))
    assert twin.sets.active == ""


def test_a_set_added_in_inference_mode() -> None:
    """Its tensors are ordinary ones, and it learns as one that was there from the beginning."""
    late, early = Whole(affine=True, layers="window"), Whole(affine=True, layers="window")
    early.sets.add("late")
    with torch.inference_mode():
        late.sets.add("late")
    for whole in (late, early):
        torch.manual_seed(1)
        with whole.sets.use("late"):
            for batch in batches(4):
                loss(whole.net(batch)).backward()
    assert_same(late.sets.state_dict("late"), early.sets.state_dict("late"))


def test_every_tensor_is_registered_once() -> None:
    """Optimizers, averages and DDP find each set's tensors, in the same number whatever set is in use."""
    whole = Whole(affine=True)
    parameters, buffers = {*whole.parameters()}, {*whole.buffers()}
    assert len(parameters) == len({*network().parameters()}) + 2 * 4
    assert len(buffers) == 3 * 6
    assert len(list(whole.named_parameters(remove_duplicate=False))) == len(parameters)
    with whole.sets.use(""):
        assert {*whole.parameters()} == parameters
        assert {*whole.buffers()} == buffers
    assert len(whole.sets.parameters_of("")) == 4
    assert not Whole().sets.parameters_of("")


def test_layers_may_be_converted_after_their_sets() -> None:
    """What `ConvertBatchNorm` does to a module that was built with sets: each set gets a history of its own; `to_torch`
    takes it away."""
    whole = Whole()
    convert_batch_norm(whole.net, Window(2))
    data = [batches(3) for _ in range(4)]
    for each in data:
        train(whole, each)
    assert "sets.set=.1.averaging.rows" in whole.state_dict()
    inputs: list[oracles.Array] = []
    handle = whole.net[1].register_forward_pre_hook(lambda _, args: inputs.append(oracles.channels(args[0])))
    for _ in range(2):
        with whole.sets.use(""):
            whole.net(batches(1)[0])
    handle.remove()
    with whole.sets.use(""):
        assert whole.net[1].running_mean.numpy() == pytest.approx(oracles.window(inputs, 2, pooled=False)[0], abs=1e-5)
    to_torch(whole.net)
    assert not [key for key in whole.state_dict() if "averaging" in key]
    with whole.sets.use("width=0.5"):
        assert type(whole.net[1]) is nn.BatchNorm2d
