"""The change of the statistics of many layers, made or undone as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.buffers import running_statistics
from lightning_bn.set_in_use import in_set


@dataclass(frozen=True)
class StatisticsChange:
    """New running statistics of one layer, with the ones it had."""

    layer: _BatchNorm
    old: tuple[Tensor, Tensor]  # copies of running_mean and running_var, (C,)
    new: tuple[Tensor, Tensor]  # in the buffers' dtype and on their device
    tensors: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # the layer's own, of its average's history, if that changes
    old_history: Mapping[str, Tensor] = field(default_factory=dict)  # copies of them
    new_history: Mapping[str, Tensor] = field(default_factory=dict)
    of_set: str | None = None  # the layer's set of statistics, as `set_in_use` names it

    def write(self, statistics: tuple[Tensor, Tensor], history: Mapping[str, Tensor]) -> None:
        """Write mean and variance into the layer's buffers, and the history where it is, in place."""
        # `detach`, and no block without grad: an interrupt at its end would leave the grad mode behind.
        with in_set(self.layer, self.of_set):
            for buffer, value in zip(running_statistics(self.layer), statistics, strict=True):
                buffer.detach().copy_(value)
        for name, tensor in self.tensors.items():
            tensor.detach().copy_(history[name])


def completely(undo: Callable[[], None]) -> None:
    """Call `undo`, which may be done twice, and again where a Ctrl-C ends it half-way.

    One that comes between two instructions around the call is not caught: Python can't hold it back there.
    """
    try:
        undo()
    except BaseException:
        undo()
        raise


def undo(changes: Iterable[StatisticsChange]) -> None:
    """Write the old statistics of every change back."""
    for change in changes:
        change.write(change.old, change.old_history)


def commit(changes: list[StatisticsChange]) -> None:
    """Write the new statistics of every change, or, whatever is raised on the way, of none."""
    try:
        for change in changes:
            change.write(change.new, change.new_history)
    except BaseException:
        completely(partial(undo, changes))
        raise
