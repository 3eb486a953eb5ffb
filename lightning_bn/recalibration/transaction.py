"""What a pass over data touches besides the statistics, put back; and the change of the statistics, made or undone as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.torch_internals import is_compiled

__all__ = ["StatisticsChange", "commit", "eager", "kept_buffers", "undo"]


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


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Give every module its own buffers back at exit, the same tensors with the same values."""
    kept = [
        (module, name, buffer, buffer.detach().clone(), _version(buffer))
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, value, version in kept:
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
            if version is None or _version(buffer) != version:
                with torch.no_grad():
                    buffer.copy_(value)


def _version(buffer: Tensor) -> int | None:
    """The number of in-place writes so far; a tensor made in inference mode does not count them."""
    return None if buffer.is_inference() else buffer._version


def eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which a compiled model runs as it was written: the code that was compiled knows nothing of later hooks."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()
