"""Conversion gives any batch norm the average and takes nothing from it; to_torch is its inverse."""

from __future__ import annotations

import copy
import pickle
import re

import oracles
import pytest
import torch
import torch.nn.functional as F
from third_party import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_bn import (
    Averaging,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Cumulative,
    Exponential,
    Window,
    convert_batch_norm,
    to_torch,
)

AVERAGES = [Exponential(0.1), Exponential(0.3, debias=True), Window(3), Window(4, pooled=True), Cumulative()]
each_average = pytest.mark.parametrize("averaging", AVERAGES, ids=str)


class OwnStatistics(nn.BatchNorm2d):
    """A subclass that keeps its statistics by a rule of its own, and so can't be served."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, None, None, self.weight, self.bias, True)


class Untracked(nn.BatchNorm2d):
    """A subclass with a forward of its own, to be built without running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Failing(BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        if x.shape[0] == 3:
            raise RuntimeError("three")
        return x


def model() -> nn.Sequential:
    shared = nn.BatchNorm2d(4)
    return nn.Sequential(
        nn.Conv2d(2, 4, 1), shared, nn.Conv2d(4, 4, 1), shared, BatchNormAct2d(4), nn.Flatten(), nn.BatchNorm1d(36)
    )


def batches(count: int) -> list[Tensor]:
    return [torch.randn(3 + t % 3 + 1, 4, 3, 3) * 2 + t for t in range(count)]


@each_average
def test_keeps_everything(averaging: Averaging) -> None:
    """Identity, parameters, buffers, flags, hooks, names, twice-registered modules and optimizers stay as they were."""
    net = model()
    calls: list[str] = []
    net[1].register_forward_hook(lambda *_: calls.append("hook"))
    net[1].weight.requires_grad_(False)
    net[6].eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = {name: id(tensor) for name, tensor in [*net.named_parameters(), *net.named_buffers()]}
    modules = [id(module) for module in net]

    assert convert_batch_norm(net, averaging) is net
    assert [id(module) for module in net] == modules
    assert {name: id(tensor) for name, tensor in [*net.named_parameters(), *net.named_buffers()]} == before
    assert type(net[1]) is BatchNorm2d
    assert net[1] is net[3]
    assert type(net[6]) is BatchNorm1d
    assert type(net[4]) is BatchNormAct2d
    assert not net[6].training
    assert net[1].training
    assert not net[1].weight.requires_grad
    output = net(torch.randn(4, 2, 3, 3))
    assert calls == ["hook", "hook"]
    output.square().sum().backward()
    bias = net[4].bias.clone()
    optimizer.step()
    assert not torch.equal(net[4].bias, bias)


@pytest.mark.parametrize("theirs", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_round_trip_leaves_no_trace(theirs: type[nn.Module]) -> None:
    """Converted and back, a layer has torch's class, torch's attributes and torch's state dict, which a plain one loads
    strictly."""
    layer = theirs(3)
    attributes = set(layer.__dict__)
    converted = convert_batch_norm(layer, Window(3))
    assert isinstance(converted, (BatchNorm1d, BatchNorm2d, BatchNorm3d))
    back = to_torch(converted)
    assert type(back) is theirs
    assert set(back.__dict__) == attributes
    assert repr(back) == repr(theirs(3))
    theirs(3).load_state_dict(back.state_dict(), strict=True)


def test_to_torch_keeps_what_was_learned() -> None:
    """The plain model evaluates as the converted one did, and goes on training with an exponential averaging's
    momentum."""
    net = convert_batch_norm(model(), Exponential(0.25))
    for _ in range(3):
        net(torch.randn(4, 2, 3, 3))
    batch = torch.randn(4, 2, 3, 3)
    expected = net.eval()(batch)
    plain = to_torch(net)
    assert torch.equal(plain(batch), expected)
    assert plain[1].momentum == plain[4].momentum == 0.25
    assert not plain[4]._forward_hooks
    assert not plain[4]._forward_pre_hooks
    assert not any("averaging" in key for key in plain.state_dict())
    assert list(plain[4].__dict__) == list(BatchNormAct2d(4).__dict__)
    model().load_state_dict(plain.state_dict(), strict=True)


def test_to_torch_of_a_layer_without_statistics() -> None:
    """A layer of this package's that keeps no running statistics becomes torch's like any other."""
    layer = to_torch(BatchNorm2d(4, track_running_stats=False))
    assert type(layer) is nn.BatchNorm2d
    assert layer.running_mean is None
    layer(torch.randn(2, 4, 3, 3))


@each_average
def test_a_subclass_gets_the_average(averaging: Averaging) -> None:
    """Its running statistics are, batch by batch, those of this package's own layer; its outputs are its own."""
    served, reference, alone = (
        convert_batch_norm(BatchNormAct2d(4), averaging),
        BatchNorm2d(4, averaging=averaging),
        BatchNormAct2d(4),
    )
    for batch in batches(8):
        reference(batch)
        assert torch.equal(served(batch), alone(batch))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(getattr(served, name), getattr(reference, name)), name
    assert served.momentum == (0.1 if averaging.kernel_momentum is None else averaging.kernel_momentum)
    last = batches(9)[-1]
    assert torch.equal(served.eval()(last), F.relu(reference.eval()(last)))


def test_a_window_over_a_subclass_is_the_oracles() -> None:
    """The same against a naive loop that shares no code with either."""
    served = convert_batch_norm(BatchNormAct2d(4), Window(3))
    data = batches(7)
    for batch in data:
        served(batch)
    mean, var = oracles.window([oracles.channels(batch) for batch in data], 3, False)
    torch.testing.assert_close(served.running_mean.double(), torch.tensor(mean), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(served.running_var.double(), torch.tensor(var), rtol=1e-5, atol=1e-5)


def test_a_served_subclass_is_safe() -> None:
    """A non-finite batch, a forward that raises and eval leave no trace, and not a scratch value."""
    served = convert_batch_norm(Failing(4), Window(3))
    served(torch.randn(4, 4, 3, 3))
    before = copy.deepcopy(served.state_dict())
    served(torch.full((4, 4, 3, 3), float("nan")))
    with pytest.raises(RuntimeError, match="three"):
        served(torch.randn(3, 4, 3, 3))
    served.eval()(torch.randn(4, 4, 3, 3))
    assert served.momentum == 0.1
    assert all(torch.equal(value, before[key]) for key, value in served.state_dict().items())


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_a_served_subclass_can_be_copied(way: object) -> None:
    """A copy averages into its own history and leaves the original's alone."""
    served = convert_batch_norm(BatchNormAct2d(4), Window(3))
    twin = way(served)
    twin(torch.randn(4, 4, 3, 3))
    assert (twin.averaging.cursor == 1).all()
    assert (served.averaging.cursor == 0).all()
    assert to_torch(twin) is twin


def test_keyword_input() -> None:
    """A served subclass may be called with its input by keyword."""
    served = convert_batch_norm(BatchNormAct2d(4), Window(3))
    served(x=torch.ones(2, 4, 3, 3))
    assert torch.equal(served.running_mean, torch.ones(4))


def test_sync_batch_norm_outside_a_group() -> None:
    """torch's SyncBatchNorm keeps its class and gets the average."""
    served = convert_batch_norm(nn.SyncBatchNorm(4), Window(3))
    batch = torch.randn(4, 4, 3, 3)
    served(batch)
    assert type(served) is nn.SyncBatchNorm
    torch.testing.assert_close(served.running_mean, batch.mean((0, 2, 3)))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (OwnStatistics(4), "does not leave the batch's mean"),
        (nn.LazyBatchNorm2d(), "lazy"),
        (nn.BatchNorm2d(4, track_running_stats=False), "keeps no running statistics"),
        (Untracked(4, track_running_stats=False), "keeps no running statistics"),
    ],
    ids=["own statistics", "lazy", "untracked", "an untracked subclass"],
)
def test_refused_by_name(layer: nn.Module, reason: str) -> None:
    """What is not supported is named with the reason, and nothing in the model is changed."""
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(layer))
    with pytest.raises(
        TypeError,
        match=rf"can't attach the averaging to 1\.0 \({type(layer).__name__}\): .*{reason}.*Nothing was changed",
    ):
        convert_batch_norm(net, Window(3))
    assert type(net[0]) is nn.BatchNorm2d
    assert type(net[1][0]) is type(layer)


def test_trying_out_leaves_the_rng_and_the_layer() -> None:
    """Asking a subclass whether it is supported draws nothing from the global generator and runs none of its hooks."""
    layer = BatchNormAct2d(4, drop=0.5)
    layer.register_forward_hook(lambda *_: pytest.fail("the trial ran the user's hook"))
    state = torch.get_rng_state()
    convert_batch_norm(layer, Window(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.num_batches_tracked == 0


def test_a_meta_model_converts() -> None:
    """A model on the meta device can be converted before it is filled."""
    with torch.device("meta"):
        net = model()
    convert_batch_norm(net, Window(3)).to_empty(device="cpu")
    net.load_state_dict(convert_batch_norm(model(), Window(3)).state_dict())
    net(torch.randn(4, 2, 3, 3))


def test_a_second_conversion_replaces_the_first() -> None:
    """Converted again, a layer keeps its statistics and starts the new average; None goes back to torch's rule."""
    net = convert_batch_norm(model(), Window(3))
    net(torch.randn(4, 2, 3, 3))
    mean = net[1].running_mean.clone()
    convert_batch_norm(net, Window(7, pooled=True))
    assert torch.equal(net[1].running_mean, mean)
    assert str(net[1].averaging) == str(net[4].averaging) == "Window(size=7, pooled=True)"
    assert len(net[4]._forward_hooks) == 1
    convert_batch_norm(net)
    assert list(net.state_dict()) == list(model().state_dict())
    assert repr(net[1]) == repr(nn.BatchNorm2d(4))


def test_a_subclass_of_ours_is_not_stripped() -> None:
    """to_torch names what it has no counterpart for, and changes nothing."""

    class Mine(BatchNorm2d):
        pass

    net = nn.Sequential(BatchNorm2d(4, averaging=Window(3)), Mine(4))
    with pytest.raises(TypeError, match=r"to_torch\(module\) can't turn 1 \(Mine\)"):
        to_torch(net)
    assert type(net[0]) is BatchNorm2d


@pytest.mark.parametrize("names", [["weight"], ["weight", "bias"]], ids=str)
def test_a_layer_that_was_parametrized_later(names: list[str]) -> None:
    """to_torch says what to call, which runs as printed, and then turns the layer."""
    net = convert_batch_norm(nn.Sequential(nn.BatchNorm2d(4)), Window(3))
    for name in names:
        parametrize.register_parametrization(net[0], name, nn.Softplus())
    with pytest.raises(TypeError, match=r"was parametrized after it was converted; call (.*) first") as raised:
        to_torch(net)
    exec(re.search("call (.*) first", str(raised.value))[1], {"torch": torch, "layer": net[0]})
    weight = net[0].weight.detach().clone()
    assert type(to_torch(net)[0]) is nn.BatchNorm2d
    assert torch.equal(net[0].weight, weight)


def test_averaging_must_be_one() -> None:
    """A number is refused with the call to make."""
    with pytest.raises(TypeError, match=r"convert_batch_norm\(module, 20\): .*Window\(20\)"):
        convert_batch_norm(nn.BatchNorm1d(3), 20)
