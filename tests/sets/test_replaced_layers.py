"""Sets of statistics whose layers others stand in for."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from small_sets import NAMES, Whole, assert_same, batches, network, statistics_of
from torch import nn
from torch.ao.quantization import fuse_modules
from torch.utils.checkpoint import checkpoint

from lightning_bn import StatisticsSets
from lightning_bn.set_in_use import set_in_use


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("converted_in", NAMES)
@pytest.mark.parametrize("moved", [False, True])
def test_sets_follow_a_conversion_to_sync_batchnorm(affine: bool, converted_in: str, moved: bool) -> None:
    """As ``Trainer(sync_batchnorm=True)`` does it, after the sets were made: each set goes on where it was, whichever
    was in place, also where the model was moved meanwhile."""
    whole, plain = Whole(affine=affine), Whole(affine=affine)
    for each in (whole, plain):
        torch.manual_seed(2)
        for name, batch in zip(NAMES, batches(3), strict=True):
            with each.sets.use(name):
                each.net(batch)
    with whole.sets.use(converted_in):
        whole.net = nn.SyncBatchNorm.convert_sync_batchnorm(whole.net)
        if moved:
            whole.double().float()
    whole = copy.deepcopy(whole)
    assert isinstance(whole.net[1], nn.SyncBatchNorm)
    for name in NAMES:
        assert_same(statistics_of(whole, name), statistics_of(plain, name))
    with whole.sets.use("width=0.5"):
        assert whole.net[1].running_mean is not statistics_of(whole, "clean")["1.running_mean"]
        assert torch.equal(whole.net[1].running_mean, statistics_of(plain, "width=0.5")["1.running_mean"])
    assert set(plain.state_dict()) == set(whole.state_dict())
    assert_same(dict(plain.state_dict()), dict(whole.state_dict()))


def test_layers_that_took_over_know_of_their_sets() -> None:
    """Whoever asks such a layer finds them, and it is not run again in backward with another set."""
    whole = Whole()
    whole.net = nn.SyncBatchNorm.convert_sync_batchnorm(whole.net)
    with whole.sets.use(""):
        assert set_in_use(whole.net[1]) == ""
        output = checkpoint(whole.net, batches(1)[0], use_reentrant=False)
    with pytest.raises(RuntimeError, match="Activation checkpointing runs a SyncBatchNorm again"):
        output.sum().backward()


def fused(whole: Whole) -> None:
    fuse_modules(whole.eval().net, [["0", "1"]], inplace=True)


def renewed(whole: Whole) -> None:
    whole.net[3][1] = nn.BatchNorm2d(8)


@pytest.mark.parametrize(("replace", "named"), [(fused, "1"), (renewed, "3.1")])
def test_layers_that_are_gone_are_named(replace: Callable[[Whole], None], named: str) -> None:
    """Where a layer is fused into its convolution, or is another one by now, an exchange would change nothing that
    runs: it is refused, before anything is exchanged."""
    whole = Whole()
    replace(whole)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"StatisticsSets: {named} has been replaced"), whole.sets.use(""):
            pass
    assert whole.sets.active == "clean"


def converted(model: nn.Sequential) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


def renewed_in_one_place(model: nn.Sequential) -> None:
    model[1][0] = nn.BatchNorm2d(3)


def taken_out_of_one_place(model: nn.Sequential) -> None:
    model[1][0] = nn.Identity()


@pytest.mark.parametrize("replace", [converted, renewed_in_one_place, taken_out_of_one_place])
def test_a_layer_at_two_places_that_is_no_longer_one_is_named(
    replace: Callable[[nn.Sequential], None],
) -> None:
    """`convert_sync_batchnorm` makes two layers of one: an exchange would reach but one place."""
    layer = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Sequential(layer), nn.Sequential(layer))
    sets = StatisticsSets(model, ["a", "b"])
    replace(model)
    with pytest.raises(RuntimeError, match=r"StatisticsSets: 0\.0 has been replaced"), sets.use("b"):
        pass
    assert sets.active == "a"


def test_a_layer_at_two_places_that_stays_one_is_followed() -> None:
    """Wherever it is, it has the set in use."""
    layer = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Sequential(layer), nn.Sequential(layer))
    sets = StatisticsSets(model, ["a", "b"])
    model[0][0] = model[1][0] = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    with sets.use("b"):
        model[0][0].running_mean.fill_(2.0)
    assert sets.state_dict("b")["1.0.running_mean"].tolist() == [2.0] * 3
    assert sets.state_dict("a")["1.0.running_mean"].tolist() == [0.0] * 3


def test_a_layer_that_comes_back_is_served() -> None:
    """As where a wrapper is taken off again."""
    whole = Whole()
    layer = whole.net[1]
    whole.net[1] = nn.Identity()
    with pytest.raises(RuntimeError, match="replaced"), whole.sets.use(""):
        pass
    whole.net[1] = layer
    with whole.sets.use(""):
        whole.net(batches(1)[0])
    assert statistics_of(whole, "")["1.num_batches_tracked"] == 1


def test_a_wrapper_around_layers_is_no_replacement() -> None:
    """As of ``torch.compile``, or a strategy that wraps parts."""

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model = nn.Sequential(network())
    sets = StatisticsSets(model, ["a", "b"])
    model[0] = Wrapped(model[0])
    model[0].inner[3] = Wrapped(model[0].inner[3])
    with sets.use("b"):
        model(batches(1)[0])
        assert model[0].inner[1].num_batches_tracked == 1
    assert model[0].inner[1].num_batches_tracked == 0
