"""The change of the statistics of many layers, made or undone as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["StatisticsChange", "commit", "undo"]


@dataclass(frozen=True)
class StatisticsChange:
    """New running statistics of one layer, beside the ones it had."""

    layer: _BatchNorm
    old: tuple[Tensor, Tensor]  # copies of running_mean and running_var, (C,)
    new: tuple[Tensor, Tensor]  # in the buffers' dtype and on their device

    def write(self, statistics: tuple[Tensor, Tensor]) -> None:
        """Write mean and variance into the layer's buffers, in place."""
        with torch.no_grad():
            self.layer.running_mean.copy_(statistics[0])
            self.layer.running_var.copy_(statistics[1])


def undo(changes: Iterable[StatisticsChange]) -> None:
    """Write the old statistics of every change back."""
    for change in changes:
        change.write(change.old)


def commit(changes: list[StatisticsChange]) -> None:
    """Write the new statistics of every change, or, whatever is raised on the way, of none."""
    try:
        for change in changes:
            change.write(change.new)
    except BaseException:
        undo(changes)
        raise
