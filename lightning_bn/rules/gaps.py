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
from lightning_bn.rules.readings import Reading

__all__ = ["LEAST_TRACKED", "Gap", "Marks", "gaps"]

LEAST_TRACKED = 30
"""Batches after which an evaluation may be held to the statistics it reads: torch's default average has left its start
by then."""

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
    """Of ``log((var + eps) / (running_var + eps))``; 0 for a channel whose batches have a variance below eps."""
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
            or running_mean(module).dtype.itemsize < 4
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
        # A channel that is constant in the batches is near 0 whatever divides it, so a variance still on its way from 1
        # to 0 costs nothing. BN210 sees an evaluation in which the channel varies.
        log_ratio = log_ratio.where(var > module.eps, 0.0)
        found[index] = Gap(new.layer, _rms(shift), _rms(log_ratio), updates, new.tracked)
    return found


class Marks:
    """Readings in the course of a training epoch, with which the statistics at its end are compared.

    Args:
        layers: the model's batch-norm layers.
    """

    def __init__(self, layers: Sequence[BatchNormLayer]) -> None:
        self._layers = layers
        self._marks: list[Reading] = []

    def forget(self) -> None:
        """An epoch begins, or somebody wrote into the statistics."""
        self._marks = []

    def take(self, index: int, batches: float) -> None:
        """Batch number `index` of `batches` begins (infinity: unknown): take a reading at the start of the epoch,
        as it may be cut short, and shortly before its end."""
        near = index == batches - _BATCHES_A_READING if math.isfinite(batches) else index % _BATCHES_A_READING == 0
        if near and math.isfinite(batches):
            self._marks = [Reading(self._layers)]
        elif near or not self._marks:
            self._marks = [*self._marks[-1:], Reading(self._layers)]

    def gaps(self) -> dict[int, Gap]:
        """Return how far each layer's statistics are from those of the batches since; waits for the device."""
        return gaps(self._marks[0], Reading(self._layers)) if self._marks else {}


def _rms(values: Tensor) -> float:
    return math.sqrt(values.square().mean().item())
