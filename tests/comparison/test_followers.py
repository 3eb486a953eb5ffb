"""Followers hold what the layers would hold under other averages, and the layers don't notice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import oracles
import processes
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bn import (
    Averaging,
    BatchNorm1d,
    BatchNorm2d,
    Cumulative,
    Exponential,
    Window,
    convert_batch_norm,
    paused_statistics,
)
from lightning_bn.comparison.followers import Followers

AVERAGES: dict[str, Averaging] = {
    "ema": Exponential(0.3),
    "debiased": Exponential(0.3, debias=True),
    "window": Window(3),
    "pooled": Window(3, pooled=True),
    "all": Cumulative(),
}
ORACLES: dict[str, Callable[[list[oracles.Array]], tuple[oracles.Array, oracles.Array]]] = {
    "ema": lambda batches: oracles.exponential(batches, 0.3, False, False),
    "debiased": lambda batches: oracles.exponential(batches, 0.3, True, False),
    "window": lambda batches: oracles.window(batches, 3, False),
    "pooled": lambda batches: oracles.window(batches, 3, True),
    "all": lambda batches: oracles.cumulative(batches, False),
}


class Scaled(nn.BatchNorm2d):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def batches(count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 3, 2, 2, generator=generator) * 2 + step for step in range(count)]


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(3), BatchNorm2d(3), Scaled(3)],
    ids=lambda layer: f"{type(layer).__module__}.{type(layer).__name__}",
)
def test_each_average_is_the_oracles(layer: nn.Module, name: str) -> None:
    """Under every class of layer the statistics are those of a float64 loop over the batches."""
    layer = copy.deepcopy(layer)
    followers = Followers(layer, AVERAGES)
    with followers.following():
        for batch in batches():
            layer(batch)
    own = copy.deepcopy(layer.state_dict())
    expected = ORACLES[name]([oracles.channels(batch) for batch in batches()])
    with followers.applied(name):
        torch.testing.assert_close(layer.running_mean.double(), torch.tensor(expected[0]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), torch.tensor(expected[1]), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, own[key]) for key, value in layer.state_dict().items())


def test_a_converted_model_holds_the_same() -> None:
    """What a follower holds is what the layer itself holds after convert_batch_norm(model, averaging), pretrained
    statistics included."""
    pretrained = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    pretrained(batches(1)[0])
    for name, averaging in AVERAGES.items():
        model, converted = copy.deepcopy(pretrained), convert_batch_norm(copy.deepcopy(pretrained), averaging)
        followers = Followers(model, {name: averaging})
        with followers.following():
            for batch in batches():
                model(batch)
                converted(batch)
        with followers.applied(name):
            torch.testing.assert_close(model[1].running_mean, converted[1].running_mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(model[1].running_var, converted[1].running_var, rtol=1e-5, atol=1e-6)


def test_the_layers_do_not_notice() -> None:
    """Outputs, gradients and statistics are those of a model that is not followed, to the bit, and no hook stays."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), BatchNorm2d(4))
    followed = copy.deepcopy(plain)
    with Followers(followed, AVERAGES).following():
        for batch in batches():
            outputs = [model(batch) for model in (plain, followed)]
            assert torch.equal(*outputs)
            for output in outputs:
                output.square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), followed.parameters(), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), followed.state_dict().values(), strict=True)
    )
    assert not any(module._forward_hooks for module in followed.modules())


@pytest.mark.parametrize("kind", ["eval", "paused", "recomputed", "not finite", "one value", "empty"])
def test_what_does_not_move_the_layers_does_not_move_the_followers(kind: str) -> None:
    """Eval, paused_statistics, recomputation in the backward, NaN, one value per channel, no value: none of them
    counts."""
    layer = BatchNorm2d(3)
    followers = Followers(layer, {"all": Cumulative()})
    first, second, *_ = batches()
    with followers.following():
        layer(first)
        if kind == "eval":
            layer.eval()(second)
        elif kind == "paused":
            with paused_statistics(layer):
                layer(second)
        elif kind == "recomputed":
            checkpoint(layer, second.requires_grad_(), use_reentrant=False).sum().backward()
        elif kind == "not finite":
            layer(second.clone().fill_(float("nan")))
        elif kind == "empty":
            layer(second[:0])
        else:
            with pytest.raises(ValueError, match="more than 1 value"):
                layer(second[:1, :, :1, :1])
    assert followers.state_dict()["all"][""]["num_batches_tracked"] == 1 + (kind == "recomputed")


def test_a_mask_is_honoured() -> None:
    """Only valid positions of padded input count, given by position or by name."""
    mask = torch.tensor([[True, False], [True, True]])
    input = torch.tensor([[[1.0, 100.0]], [[3.0, 5.0]]])
    for call in (
        lambda layer: layer(input, mask),
        lambda layer: layer(input, mask=mask),
        lambda layer: layer(input=input, mask=mask),
    ):
        layer = BatchNorm1d(1)
        followers = Followers(layer, {"window": Window(1)})
        with followers.following():
            call(layer)
        with followers.applied("window"):
            assert (layer.running_mean.item(), layer.running_var.item()) == (3.0, 4.0)


@pytest.mark.parametrize("name", AVERAGES)
def test_saving_and_loading_goes_on_to_the_bit(name: str) -> None:
    """state_dict in the middle, load_state_dict into followers of a new model, go on: the same statistics, bit for
    bit."""
    layer = nn.BatchNorm2d(3)
    whole = Followers(layer, AVERAGES)
    with whole.following():
        for step, batch in enumerate(batches()):
            if step == 2:
                state = copy.deepcopy(whole.state_dict())
            layer(batch)
    again = nn.BatchNorm2d(3)
    resumed = Followers(again, AVERAGES)
    resumed.load_state_dict(state)
    with resumed.following():
        for batch in batches()[2:]:
            again(batch)
    one, two = whole.state_dict()[name][""], resumed.state_dict()[name][""]
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_a_state_of_another_rule_under_the_same_name_is_refused() -> None:
    """With both rules named, though the shapes agree."""
    layer = nn.BatchNorm2d(3)
    followers = Followers(layer, {"mine": Exponential(0.2, pooled=True)})
    with followers.following():
        layer(batches()[0])
    resumed = Followers(layer, {"mine": Cumulative(pooled=True)})
    with pytest.raises(
        RuntimeError,
        match=r"the state of Exponential\(pooled=True\), and this layer averages by Cumulative\(pooled=True\)",
    ):
        resumed.load_state_dict(followers.state_dict())


def test_an_average_that_was_not_saved_starts_with_the_layers() -> None:
    """A name that is new in the resumed run starts from the buffers."""
    layer = nn.BatchNorm2d(3)
    state = Followers(layer, {"old": Window(3)}).state_dict()
    layer(batches()[4])
    followers = Followers(layer, {"new": Window(5)})
    followers.load_state_dict(state)
    with followers.applied("new"):
        assert layer.num_batches_tracked == 1
    assert torch.equal(followers.state_dict()["new"][""]["running_mean"], layer.running_mean)


def test_own_statistics_come_back_after_an_exception() -> None:
    """applied() is undone also after an exception."""
    layer = nn.BatchNorm2d(3)
    followers = Followers(layer, {"window": Window(1)})
    with followers.following():
        layer(batches()[4])
    before = copy.deepcopy(layer.state_dict())

    def interrupted() -> None:
        with followers.applied("window"):
            assert not torch.equal(layer.running_mean, before["running_mean"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_half_precision_layers_are_followed_in_float32() -> None:
    """A bf16 layer's own average stalls; the follower's does not, and what is applied is its value, rounded once."""
    layer = nn.BatchNorm1d(1, momentum=0.01).bfloat16()
    followers = Followers(layer, {"same": Exponential(0.01)})
    data = torch.tensor([[4.0], [6.0]], dtype=torch.bfloat16)
    with followers.following():
        for _ in range(600):
            layer(data)
    assert followers.state_dict()["same"][""]["running_mean"].item() == pytest.approx(5 * (1 - 0.99**600), rel=1e-4)
    with followers.applied("same"):
        assert layer.running_mean.item() == pytest.approx(5 * (1 - 0.99**600), rel=1e-2)


def _synchronised(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    processes.join_group(rank, world, store)
    from lightning_bn.ranks.synchronization import synchronise

    layer = nn.BatchNorm2d(3)
    synchronise(layer)
    followers = Followers(layer, {"window": Window(2), "ema": Exponential(0.1)})
    with followers.following():
        for batch in batches():
            layer(batch[:1] if rank == 0 else batch[1:])
    with followers.applied("window"):
        mean, var = oracles.window([oracles.channels(batch) for batch in batches()], 2, False)
        torch.testing.assert_close(layer.running_mean.double(), torch.tensor(mean), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), torch.tensor(var), rtol=1e-5, atol=1e-6)
    own = layer.running_var.clone()
    with followers.applied("ema"):
        torch.testing.assert_close(layer.running_var, own, rtol=1e-5, atol=1e-6)
    processes.leave_group()


def test_a_synchronised_layer_is_followed_over_all_ranks(tmp_path: Path) -> None:
    """Where the layer's batch is that of all ranks, one image here and three there, so is the follower's."""
    processes.spawn(_synchronised, 2, str(tmp_path / "store"))


def test_mistakes() -> None:
    """What can't be followed is told at once."""
    with pytest.raises(ValueError, match="no batch-norm layer"):
        Followers(nn.Linear(1, 1), {"a": Window(2)})
    with pytest.raises(TypeError, match="Window"):
        Followers(nn.BatchNorm1d(1), {"a": 0.1})  # type: ignore[dict-item]


@pytest.mark.parametrize("converted", [False, True], ids=["torch's layers", "converted"])
def test_channels_that_are_removed(converted: bool) -> None:
    """The averages of such a layer begin anew from what it holds, said once; those of the others go on."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    if converted:
        convert_batch_norm(model)
    followers = Followers(model, {"window": Window(3), "all": Cumulative()})
    seen: list[Tensor] = []
    model[3].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    with followers.following():
        for _ in range(3):
            model(torch.randn(8, 3))
        keep = [0, 2, 3]
        for name in ("weight", "bias"):
            setattr(model[0], name, nn.Parameter(getattr(model[0], name).data[keep]))
            setattr(model[1], name, nn.Parameter(getattr(model[1], name).data[keep]))
        model[1].running_mean, model[1].running_var = model[1].running_mean[keep], model[1].running_var[keep]
        model[2].weight = nn.Parameter(model[2].weight.data[:, keep])
        with pytest.warns(UserWarning, match="1 has another number of channels"):
            model(torch.randn(8, 3))
        inputs = [torch.randn(8, 3) for _ in range(4)]
        for each in inputs:
            model(each)
    with followers.applied("window"):
        expected = torch.stack([model[0](each).detach().mean(0) for each in inputs[-3:]]).mean(0)
        torch.testing.assert_close(model[1].running_mean, expected)
    with followers.applied("all"):
        expected = torch.stack([batch.mean(0) for batch in seen]).mean(0).float()
        torch.testing.assert_close(model[3].running_mean, expected)


@pytest.mark.parametrize("converted", [False, True], ids=["torch's layers", "converted"])
def test_transforms_of_torch_func_are_passed_over(converted: bool) -> None:
    """A fit that takes its gradients from `torch.func.grad` runs on; its batches are not followed."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    if converted:
        convert_batch_norm(model)
    followers = Followers(model, {"window": Window(3)})
    parameters = {name: each.detach().clone() for name, each in model.named_parameters()}
    buffers = {name: each.clone() for name, each in model.named_buffers()}

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(model, (parameters, buffers), (torch.randn(8, 3),))
        return output.square().mean()

    with followers.following():
        for _ in range(3):
            model(torch.randn(8, 3))
            torch.func.grad(loss)(parameters, buffers)
    assert model[1].num_batches_tracked == 3
