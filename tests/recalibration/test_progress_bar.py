"""The bar of a recalibration counts up to what its source is known to have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from commands import terminal
from fitting import trainer
from lightning.pytorch.utilities import CombinedLoader
from recalibration_models import three
from small_data import loader
from small_models import Small
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_bn import BatchNormRecalibration, recalibrate
from lightning_bn.callbacks.lightning_internals import number_of_batches


class Stream(IterableDataset[Tensor]):
    """Data without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(20.0).reshape(10, 2)


@pytest.mark.parametrize("exact", [False, True])
def test_the_total_is_that_of_the_batches(exact: bool) -> None:
    """A list and a loader have a length, num_batches is a limit, and a stream has neither."""
    batches = torch.randn(5, 4, 2).unbind()
    cases: list[tuple[Any, dict[str, int], str]] = [
        (batches, {}, "0/5 ["),
        (batches, {"num_batches": 3}, "0/3 ["),
        (batches, {"num_batches": 200}, "0/5 ["),
        (DataLoader(torch.randn(9, 2), 4), {}, "0/3 ["),
        (iter(batches), {"num_batches": 4}, "0/4 ["),
        (DataLoader(Stream(), 5), {}, "0/? ["),
    ]
    for source, options, expected in cases:
        with terminal("stderr") as read:
            recalibrate(three(), source, exact=exact, **options)
            assert expected in read()


@pytest.mark.parametrize(("options", "total"), [({}, 6), ({"dataloader": loader(12)}, 4), ({"num_batches": 2}, 2)])
def test_the_callbacks_total_is_that_of_its_loader(options: dict[str, Any], total: int) -> None:
    """The Trainer's own training data, or those that are given instead."""
    with terminal("stderr") as read:
        runner = trainer(BatchNormRecalibration(**options), enable_progress_bar=True)
        runner.fit(Small(), loader(), loader(16, shuffle=False))
        assert re.search(rf"Recalibrating 2 layers: [^\r]*0/{total} \[", read())


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle", "sequential"])
def test_a_combined_loader_has_the_batches_that_it_gives(mode: Any) -> None:
    """In each mode, before it is iterated."""
    combined = CombinedLoader({"few": loader(24), "many": loader(8)}, mode)
    assert number_of_batches(combined) == len(list(combined))
