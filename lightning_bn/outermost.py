"""Which call of a model is the outermost: hooks that tell when it begins, ends and fails."""

from __future__ import annotations

import sys
import threading
import warnings
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_bn.torch_internals import backward_task, is_replica


class OutermostForward:
    """Calls `begin`, `end` and `close` around the outermost forward of the modules that `attach` is given, in whichever
    thread calls one of them first.

    A module may call itself on the way, as a LightningModule under DDP does, whose training step is its forward, or
    another one of those attached: only the outermost call counts. Calls by a second thread at the same time, and in
    replicas of `DataParallel`, are passed over. Under `torch.compile` the hooks do nothing. Where somebody has cleared
    a module's hooks, the next forward sets them again, with a warning.
    """

    counts_recomputations = False
    """Whether a call inside a backward pass counts: the recomputation of activation checkpointing."""

    def __init__(self) -> None:
        # The thread whose forward is under way; taken by setdefault, which no other thread can interrupt.
        self._open: dict[str, int] = {}
        self._depth = 0
        self.frame: FrameType | None = None
        self._handles: dict[nn.Module, list[RemovableHandle]] = {}
        self.modules: tuple[nn.Module, ...] = ()

    def attach(self, *modules: nn.Module) -> None:
        """Set the hooks on `modules`."""
        self.modules = modules
        for module in modules:
            before = module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
            self._handles[module] = [before, *self._set_after(module)]

    def _set_after(self, module: nn.Module) -> list[RemovableHandle]:
        return [
            module.register_forward_hook(self._leave),
            # A forward that raised must not be taken for one that goes on.
            module.register_forward_hook(self._abandon, always_call=True),
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles = {}

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """The outermost forward begins, which is that of `module`; return whether to follow it to its end."""
        raise NotImplementedError

    def end(self) -> None:
        """The outermost forward has succeeded."""

    def close(self) -> None:
        """The outermost forward is over; comes after `end`, or alone where it failed."""

    def is_running(self) -> bool:
        """Whether the forward that was begun goes on: an interrupt (a BaseException) leaves it without calling any
        hook."""
        if self.frame is None:
            return False
        try:
            self.frame.clear()
        except RuntimeError:  # a frame that is being executed can't be cleared
            return True
        return False

    def abort(self) -> None:
        """Forget a forward that was interrupted."""
        self.frame = None
        self._depth = 0
        self.close()
        self._open.pop("thread", None)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or is_replica(module) or self._is_passed_over():
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
            follow = self.begin(module, args, kwargs)
        finally:
            if not follow:
                self._open.pop("thread", None)
        if follow:
            self._depth = 1
            self.frame = sys._getframe(1)  # of the call that runs the hooks: it lasts as long as the forward
            handles = self._handles.get(module, [])
            if not all(map(is_set, handles[1:])):
                warn_of_cleared_hooks(module)
                handles[1:] = self._set_after(module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and self._is_mine() and self._depth == 1:
            self.end()

    def _abandon(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or is_replica(module):
            return
        if not self._is_mine():
            if not self._open and module in self._handles and not is_set(self._handles[module][0]):
                warn_of_cleared_hooks(module)
                self.detach()
                self.attach(*self.modules)
            return
        self._depth -= 1
        if self._depth == 0:
            self.abort()

    def _is_mine(self) -> bool:
        return self._open.get("thread") == threading.get_ident() and not self._is_passed_over()

    def _is_passed_over(self) -> bool:
        return not self.counts_recomputations and backward_task() != -1

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model is not in the middle of the forward of the original.
        return self.__dict__ | {"_open": {}, "_depth": 0, "frame": None}


def is_set(handle: RemovableHandle) -> bool:
    """Whether a hook is still there: ``module._forward_hooks.clear()`` is how some remove their own, and all others."""
    return handle.id in (handle.hooks_dict_ref() or ())


def warn_of_cleared_hooks(module: nn.Module) -> None:
    """Say that hooks of this package are set again which somebody has removed together with their own."""
    warnings.warn(
        f"Forward hooks of this package on a {type(module).__name__} were removed by other code, as "
        "module._forward_hooks.clear() does, and are set again: without them running statistics would stop. Remove "
        "single hooks by the handle that register_forward_hook returns.",
        stacklevel=2,
    )
