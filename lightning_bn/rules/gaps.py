"""How far running statistics are from those of the latest batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bn.discovery import BatchNormLayer
from lightning_bn.layers.settlement import rule_of
from lightning_bn.moments import drift
from lightning_bn.rules.readings import Reading

__all__ = ["Gap", "gaps"]

LEAST_UPDATES = 5
"""The statistics of fewer batches are too noisy to be compared with."""


@dataclass(frozen=True)
class Gap:
    """How far the running statistics of a layer are from those of its latest batches.

    Root mean squares over its channels, with averages of the *unbiased within-batch* variances.
    """

    layer: BatchNormLayer
    shift: float
    """Of ``(mean - running_mean) / sqrt(running_var + eps)``: running standard deviations."""
    log_ratio: float
    """Of ``log((var + eps) / (running_var + eps))``."""
    updates: int
    """How many updates the latest batches are."""
    tracked: int


def gaps(earlier: Reading, now: Reading) -> dict[int, Gap]:
    """Compare the running statistics with the batches that came between two readings, layer by layer; waits for the
    device.

    The latest batches' statistics are in the buffers already (`Averaging.newest_weight`): no forward needs to be
    watched for them. Layers whose average does not tell (a window, a pooled one), with 16-bit buffers, and those that
    hardly moved, are left out.
    """
    before, after = earlier.values(), now.values()
    found = {}
    for index, new in after.items():
        old, module = before.get(index), new.layer.module
        updates = new.tracked - old.tracked if old else 0
        if (
            old is None
            or updates < LEAST_UPDATES
            or module.running_mean.dtype.itemsize < 4
            or new.unsound
            or old.unsound
        ):
            continue
        weight = rule_of(module).newest_weight(torch.tensor(new.tracked), torch.tensor(updates))
        if weight is None or weight == 0:
            continue
        mean, var = (
            a.double() + (b.double() - a.double()) / weight for a, b in ((old.mean, new.mean), (old.var, new.var))
        )
        shift, log_ratio = drift(mean, var, new.mean.double(), new.var.double(), module.eps)
        found[index] = Gap(new.layer, _rms(shift), _rms(log_ratio), updates, new.tracked)
    return found


def _rms(values: Tensor) -> float:
    return math.sqrt(values.square().mean().item())
