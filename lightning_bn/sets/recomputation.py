"""Activation checkpointing runs a layer again in backward, where another set may be in place than in its forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.set_in_use import sets_of
from lightning_bn.torch_internals import backward_task


class Ran:
    """The sets with which layers have run since backward last ran one again."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._is_over = False
        self.uses_in_backward = 0
        """How many `use` blocks are open that were entered in a backward."""

    def forward(self, name: str) -> None:
        """A layer runs with the set `name`."""
        if self._is_over:
            self._names.clear()
            self._is_over = False
        self._names.add(name)

    def again(self, name: str) -> bool:
        """A layer runs again, with the set `name` in place; return whether it can have been another one."""
        self._is_over = True
        return not self.uses_in_backward and bool(self._names - {name})


def guard_recomputation(layer: _BatchNorm) -> None:
    """Let the layer raise where backward runs it again and it can't be told with which set."""
    layer.register_forward_pre_hook(_before)  # a function: copies of the layer have it too, and no sets


def _before(layer: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    sets: Any = sets_of(layer)
    if sets is None:
        return
    if backward_task() == -1:
        if layer.training or torch.is_grad_enabled():
            sets.ran.forward(sets.active)
    elif sets.ran.again(sets.active):
        raise RuntimeError(
            f"Activation checkpointing runs a {type(layer).__name__} again while the set {sets.active!r} of its "
            "statistics is in place, and its forward may have had another. Call backward inside of `with "
            "sets.use(name):`, once for each set, or use sets inside of the function that is checkpointed, the first "
            "one too."
        )
