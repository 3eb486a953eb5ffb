"""Whole models that earlier versions pickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bn import Window

SAVED: dict[str, Any] = torch.load(Path(__file__).parent / "fixtures" / "model_0_1_0.pt", weights_only=False)
NAMES = list(SAVED["snapshots"][0]["layers"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moment", range(len(SAVED["snapshots"])))
def test_a_model_of_0_1_0_trains_on(moment: int, name: str) -> None:
    """A whole model pickled by 0.1.0, in the middle of its windows, goes on as it would have there."""
    snapshot = SAVED["snapshots"][moment]
    layer = snapshot["layers"][name]
    for number, (batch, (mean, var)) in enumerate(zip(snapshot["batches"], snapshot["expected"][name], strict=True)):
        layer(batch[: 3 + number % 3])
        # Another processor may sum a batch in another order; to the bit it is only on the one that saved it.
        torch.testing.assert_close((layer.running_mean, layer.running_var), (mean, var), rtol=2e-6, atol=1e-6)


def test_a_served_subclass_of_0_1_0_is_served() -> None:
    """A subclass of another package keeps its average: the hooks and what they belong to come back."""
    layer = SAVED["served"].train()
    assert isinstance(layer.averaging, Window)
    data = torch.randn(8, 3, 4, 4) + 5
    torch.nn.SyncBatchNorm.forward(layer.eval(), data)
    assert layer._forward_hooks
    assert layer._forward_pre_hooks
