"""The change of what many layers keep, made or undone as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.buffers import running_statistics
from lightning_bn.recalibration.spread import Spread, give_spread
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

    def make(self) -> None:
        """Write the new statistics and the new history."""
        self._write(self.new, self.new_history)

    def undo(self) -> None:
        """Write the old ones."""
        self._write(self.old, self.old_history)

    def _write(self, statistics: tuple[Tensor, Tensor], history: Mapping[str, Tensor]) -> None:
        # `detach`, and no block without grad: an interrupt at its end would leave the grad mode behind.
        with in_set(self.layer, self.of_set):
            for buffer, value in zip(running_statistics(self.layer), statistics, strict=True):
                buffer.detach().copy_(value)
        for name, tensor in self.tensors.items():
            tensor.detach().copy_(history[name])


@dataclass(frozen=True)
class SpreadChange:
    """What a layer keeps of the spread of images, with what it kept."""

    layer: _BatchNorm
    old: Spread | None
    new: Spread

    def make(self) -> None:
        """Let the layer keep the new one."""
        give_spread(self.layer, self.new)

    def undo(self) -> None:
        """Let it keep the old one, or none."""
        give_spread(self.layer, self.old)


Change: TypeAlias = StatisticsChange | SpreadChange


def completely(undo: Callable[[], None]) -> None:
    """Call `undo`, which may be done twice, and again where a Ctrl-C ends it half-way.

    One that comes between two instructions around the call is not caught: Python can't hold it back there.
    """
    try:
        undo()
    except BaseException:
        undo()
        raise


def undo(changes: Iterable[Change]) -> None:
    """Undo every change."""
    for change in changes:
        change.undo()


def commit(changes: Sequence[Change]) -> None:
    """Make every change, or, whatever is raised on the way, none."""
    try:
        for change in changes:
            change.make()
    except BaseException:
        completely(partial(undo, changes))
        raise
