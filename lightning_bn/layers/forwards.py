"""Hooks that tell when the outermost forward of a module begins, ends and fails."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_bn.torch_internals import in_backward, is_replica

__all__ = ["OutermostForward"]


class OutermostForward:
    """Calls `begin`, `end` and `close` around the outermost forward of `module`, in whichever thread calls it first.

    A module may call itself on the way, as a LightningModule under DDP does, whose training step is its forward: only
    the outermost call counts. Calls by a second thread at the same time, and recomputations in backward, are passed
    over. Under `torch.compile` the hooks do nothing."""

    def __init__(self) -> None:
        # The thread whose forward is under way; taken by setdefault, which no other thread can interrupt.
        self._open: dict[str, int] = {}
        self._depth = 0
        self._frame: FrameType | None = None
        self._handles: list[RemovableHandle] = []
        self.module: nn.Module | None = None

    def attach(self, module: nn.Module) -> None:
        """Place the hooks."""
        self.module = module
        self._handles = [
            module.register_forward_pre_hook(self._enter, prepend=True),
            module.register_forward_hook(self._leave),
            # A forward that raised must not be taken for one that goes on.
            module.register_forward_hook(self._abandon, always_call=True),
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin(self) -> bool:
        """The outermost forward begins; return whether to follow it to its end."""
        raise NotImplementedError

    def end(self) -> None:
        """The outermost forward has succeeded."""
        raise NotImplementedError

    def close(self) -> None:
        """The outermost forward is over; comes after `end`, or alone where it failed."""
        raise NotImplementedError

    def is_running(self) -> bool:
        """Whether the forward that was begun goes on: an interrupt (a BaseException) leaves it without calling any
        hook."""
        if self._frame is None:
            return False
        try:
            self._frame.clear()
        except RuntimeError:  # a frame that is being executed can't be cleared
            return True
        return False

    def abort(self) -> None:
        """Forget a forward that was interrupted."""
        self._frame = None
        self._depth = 0
        self.close()
        self._open.pop("thread", None)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or in_backward() or is_replica(module):
            return
        me = threading.get_ident()
        if self._open and self._open.get("thread") == me:
            if self.is_running():
                self._depth += 1
                return
            self.abort()
        if self._open.setdefault("thread", me) != me:
            return
        follow = False
        try:
            follow = self.begin()
        finally:
            if not follow:
                self._open.pop("thread", None)
        if follow:
            self._depth = 1
            self._frame = sys._getframe(1)  # of the call that runs the hooks: it lasts as long as the forward

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and self._is_mine() and self._depth == 1:
            self.end()

    def _abandon(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or not self._is_mine():
            return
        self._depth -= 1
        if self._depth == 0:
            self.abort()

    def _is_mine(self) -> bool:
        return self._open.get("thread") == threading.get_ident() and not in_backward()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model is not in the middle of the forward of the original.
        return self.__dict__ | {"_open": {}, "_depth": 0, "_frame": None}
