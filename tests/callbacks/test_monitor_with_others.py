"""What this package's other callbacks run besides is neither training nor validation to the monitor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitting import fit
from small_models import Small

from lightning_bn import (
    ActivationStatsMonitor,
    BatchNormRecalibration,
    CompareAverages,
    Window,
    convert_batch_norm,
)


def table(averaging: Window | None, *others: pl.Callback, monitor_first: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    monitor = ActivationStatsMonitor(every_n_steps=1, verbose=False)
    callbacks = [monitor, *others] if monitor_first else [*others, monitor]
    module = Small()
    if averaging is not None:
        convert_batch_norm(module, averaging)
    fit(*callbacks, module=module, max_epochs=2)
    return monitor.table()


@pytest.mark.parametrize("monitor_first", [True, False], ids=["listed first", "listed last"])
@pytest.mark.parametrize("averaging", [None, Window(3)], ids=["torch's", "window"])
@pytest.mark.parametrize(
    "other",
    [
        lambda: CompareAverages({"window": Window(3)}),
        lambda: BatchNormRecalibration(when="fit_end"),
        lambda: BatchNormRecalibration(when="fit_end", exact=True, monitor="val_loss"),
    ],
    ids=["comparison", "recalibration", "exact recalibration"],
)
def test_passes_of_others_are_not_seen(
    other: Callable[[], pl.Callback], averaging: Window | None, monitor_first: bool
) -> None:
    """The table is the same, row by row, as without the other callback: neither its validations under other
    statistics, nor its trial of the first batch, nor its pass over the data is in it."""
    alone = table(averaging, monitor_first=True)
    together = table(averaging, other(), monitor_first=monitor_first)
    assert len(alone) == len(together) > 0
    assert [str(row) for row in together] == [str(row) for row in alone]
