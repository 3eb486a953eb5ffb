"""How far running statistics are from those of the latest batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bn.buffers import running_mean
from lightning_bn.discovery import BatchNormLayer
from lightning_bn.layers.settlement import rule_of
from lightning_bn.moments import drift
from lightning_bn.rules.snapshots import StatisticsSnapshot

__all__ = ["GAP_LOG_RATIO", "LEAST_TRACKED", "START_FORGOTTEN", "Gap", "Marks", "gaps"]

LEAST_TRACKED = 30
"""Batches after which an evaluation may be held to the statistics it reads: torch's default average has left its start
by then."""

GAP_LOG_RATIO = math.log(2)
"""BN208: the variance is off by a factor of two, root mean square over the channels of the layer, on a logarithmic
scale."""

START_FORGOTTEN = 0.05
"""The weight of what the buffers started with, at and below which it is gone soon."""

LEAST_UPDATES = 5
"""The statistics of fewer batches are too noisy to be compared with."""


# The end of an epoch is compared with a reading of the statistics this many batches before it; where nobody knows when
# an epoch ends, a reading is taken every so many batches, and the last but one is compared with.
_BATCHES_A_READING = 10


@dataclass(frozen=True)
class Gap:
    """How far the running statistics of a layer are from those of its latest batches.

    Root mean squares over its channels, with averages of the *unbiased within-batch* variances.
    """

    layer: BatchNormLayer
    shift: float
    """Of ``(mean - running_mean) / sqrt(running_var + eps)``: running standard deviations."""
    log_ratio: float
    """Of ``log((var + eps) / (running_var + eps))``; 0 for a channel whose batches have a variance below eps. The
    initial 1 is left out where it is forgotten but for a rest, and is most of few channels alone."""
    updates: int
    """How many updates the latest batches are."""
    tracked: int


def gaps(earlier: StatisticsSnapshot, now: StatisticsSnapshot) -> dict[int, Gap]:
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
            or running_mean(module).dtype.itemsize < 4
            or new.unsound
            or old.unsound
        ):
            continue
        rule, tracked = rule_of(module), torch.tensor(new.tracked)
        weight, all_of_them = (rule.newest_weight(tracked, torch.tensor(n)) for n in (updates, new.tracked))
        if weight is None or all_of_them is None or weight == 0:
            continue
        mean, var = (
            a.double() + (b.double() - a.double()) / weight for a, b in ((old.mean, new.mean), (old.var, new.var))
        )
        shift, log_ratio = drift(mean, var, new.mean.double(), new.var.double(), module.eps)
        # A channel that is constant in the batches is near 0 whatever divides it, so a variance still on its way from 1
        # to 0 costs nothing. BN210 sees an evaluation in which the channel varies.
        log_ratio = log_ratio.where(var > module.eps, 0.0)
        start = 1 - float(all_of_them)
        if start <= START_FORGOTTEN:
            log_ratio = _without_start(log_ratio, var, new.var.double(), start, module.eps)
        found[index] = Gap(new.layer, _rms(shift), _rms(log_ratio), updates, new.tracked)
    return found


class Marks:
    """Readings in the course of a training epoch, with which the statistics at its end are compared.

    Args:
        layers: the model's batch-norm layers.
    """

    def __init__(self, layers: Sequence[BatchNormLayer]) -> None:
        self._layers = layers
        self._marks: list[StatisticsSnapshot] = []

    def forget(self) -> None:
        """An epoch begins, or somebody wrote into the statistics."""
        self._marks = []

    def take(self, index: int, batches: float) -> None:
        """Batch number `index` of `batches` begins (infinity: unknown): take a reading at the start of the epoch,
        as it may be cut short, and shortly before its end."""
        near = index == batches - _BATCHES_A_READING if math.isfinite(batches) else index % _BATCHES_A_READING == 0
        if near and math.isfinite(batches):
            self._marks = [StatisticsSnapshot(self._layers)]
        elif near or not self._marks:
            self._marks = [*self._marks[-1:], StatisticsSnapshot(self._layers)]

    def gaps(self) -> dict[int, Gap]:
        """Return how far each layer's statistics are from those of the batches since; waits for the device."""
        return gaps(self._marks[0], StatisticsSnapshot(self._layers)) if self._marks else {}


def _without_start(log_ratio: Tensor, var: Tensor, running_var: Tensor, start: float, eps: float) -> Tensor:
    """Return the ratios, (C,), without the initial variance of 1 where that explains them; `start` of it is left in
    `running_var`, which like `var` is *unbiased within-batch*, (C,).

    What is little of 1 is much of a small variance, such as that of a feature that is rarely there. Where most channels
    are so small, an evaluation is off all the same, and the ratios stay as they are.
    """
    rest = (running_var - start) / (1 - start)
    other = ((var.clamp(min=0) + eps) / (rest.clamp(min=0) + eps)).log()
    # Below 0 it can't have begun with 1.
    explained = (rest > -eps) & (other.abs() < log_ratio.abs()) & (log_ratio.abs() > GAP_LOG_RATIO)
    return other.where(explained, log_ratio) if explained.double().mean() < 0.5 else log_ratio


def _rms(values: Tensor) -> float:
    return math.sqrt(values.square().mean().item())
