"""What saved states of averages say of themselves, and whether a layer takes them."""

from __future__ import annotations

import pytest
import torch

from lightning_bn import Averaging, BatchNorm1d, Cumulative, Exponential, Window

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
