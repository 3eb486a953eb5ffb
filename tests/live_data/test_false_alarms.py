"""The alarm rate on clean data is what was asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_bn import drift

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
from drift import ALARMS, clean_p_values, digits, measure, p_values, trained

CUTS, BATCHES = 50, 200


def test_the_shortcut_is_drift() -> None:
    """The p-values that the other test counts are those of `drift` for the same images."""
    torch.manual_seed(0)
    data = digits()
    net = trained(type(data)(data.inputs[:400], data.labels[:400]))
    measure(net, data.inputs[400:1000])
    live = data.inputs[1000:1100]
    batches = {size: torch.randint(100, (40, size)) for size in (1, 6)}
    for size, found in p_values(net, live, batches).items():
        expected = [drift(net, live[rows]).p for rows in batches[size]]
        np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["MNIST 14x14", "digits 8x8", "patches 16x16"])
def test_the_alarm_rate_is_what_was_asked_for(name: str) -> None:
    """Within a factor of 1.5, among 10,000 held-out batches of each size, 200 after each of 50 measurements: among
    2,000 the alarms at 1 % are 20, give or take 5 by chance, and leave the factor in one of twelve such tests."""
    _, found = clean_p_values(name, CUTS, BATCHES)
    for size, values in found.items():
        for alarm in ALARMS:
            rate = (values <= alarm).mean()
            assert alarm / 1.5 <= rate <= 1.5 * alarm, (size, alarm, rate)
