"""Whole models that earlier versions pickled, and the states that they saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bn import Averaging, BatchNorm1d, Cumulative, Exponential, Window

SAVED: dict[str, Any] = torch.load(Path(__file__).parent.parent / "fixtures" / "model_0_1_0.pt", weights_only=False)
NAMES = list(SAVED["snapshots"][0]["layers"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moment", range(len(SAVED["snapshots"])))
def test_a_model_of_0_1_0_trains_on(moment: int, name: str) -> None:
    """A whole model pickled by 0.1.0, in the middle of its windows, goes on as it would have there."""
    _goes_on(SAVED["snapshots"][moment]["layers"][name], moment, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moment", range(len(SAVED["snapshots"])))
def test_a_state_of_0_1_0_is_trained_on(moment: int, name: str) -> None:
    """So does a new layer that a state_dict of 0.1.0 is loaded into, with strict=True."""
    averaging = SAVED["snapshots"][moment]["layers"][name].averaging
    layer = BatchNorm1d(3, averaging=averaging)
    layer.load_state_dict(SAVED["states"][moment][name])
    _goes_on(layer, moment, name)


def _goes_on(layer: torch.nn.Module, moment: int, name: str) -> None:
    snapshot = SAVED["snapshots"][moment]
    layer = copy.deepcopy(layer)
    for number, (batch, (mean, var)) in enumerate(zip(snapshot["batches"], snapshot["expected"][name], strict=True)):
        layer(batch[: 3 + number % 3])
        # Another processor may sum a batch in another order; to the bit it is only on the one that saved it.
        torch.testing.assert_close((layer.running_mean, layer.running_var), (mean, var), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("size", "pooled"), [(4, False), (5, False), (4, True), (5, True)])
def test_a_window_of_0_1_0_of_another_kind_is_refused(size: int, pooled: bool) -> None:
    """0.1.0 did not say what a window's rows mean; a row of one batch tells whether it counts batches or samples."""
    name = f"{'pooled ' * pooled}window of {size}"
    for state in SAVED["states"][1:]:
        before = BatchNorm1d(3, averaging=Window(size, pooled=not pooled))
        with pytest.raises(RuntimeError, match=r"the state of Window\(size=\d.*this layer averages by Window\(size=\d"):
            before.load_state_dict(state[name])


MEANINGS = [
    Window(4),
    Window(5),
    Window(4, pooled=True),
    Exponential(0.2, pooled=True),
    Exponential(0.2, pooled=True, debias=True),
    Cumulative(pooled=True),
]


@pytest.mark.parametrize("saved", MEANINGS, ids=str)
@pytest.mark.parametrize("present", MEANINGS, ids=str)
def test_a_state_that_means_something_else_is_refused(saved: Averaging, present: Averaging) -> None:
    """With both rules named, also where the shapes agree; without strict the keys are returned and the history is
    empty."""
    source, target = (BatchNorm1d(3, averaging=averaging) for averaging in (saved, present))
    for layer in (source, target):
        for _ in range(3):
            layer(torch.randn(4, 3))
    if saved.state_meaning == present.state_meaning:
        target.load_state_dict(source.state_dict())
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())
        return
    with pytest.raises(RuntimeError) as caught:
        target.load_state_dict(source.state_dict())
    assert saved.state_meaning in str(caught.value)
    assert str(present) in str(caught.value)
    returned = target.load_state_dict(source.state_dict(), strict=False)
    assert returned.unexpected_keys
    assert all(not value.any() for value in target.averaging.state().values())


def test_a_served_subclass_of_0_1_0_is_served() -> None:
    """A subclass of another package keeps its average: the hooks and what they belong to come back."""
    layer = SAVED["served"].train()
    assert isinstance(layer.averaging, Window)
    data = torch.randn(8, 3, 4, 4) + 5
    torch.nn.SyncBatchNorm.forward(layer.eval(), data)
    assert layer._forward_hooks
    assert layer._forward_pre_hooks
