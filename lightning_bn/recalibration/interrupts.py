"""Ctrl-C at a moment at which a change is neither undone nor done: held back until it is."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

__all__ = ["HeldInterrupts"]


class HeldInterrupts:
    """Hold SIGINT back inside the block, but where `allowed`; raise it at the end, after `undo`.

    A ``finally`` alone does not do: the interrupt may come between two of its lines, or between the last line of a
    set-up and the ``try``. Python gives signals to the main thread alone; in another thread, or where no Python handler
    is set, nothing is held.

    Blocks nest: what is `allowed` in the inner one goes through, and what that one held comes at the end of the outer.

    Python can't raise inside a callback of its garbage collector, a weak reference's callback or a ``__del__``: it
    reports the exception and goes on. An interrupt that is lost in this way is held, and raised by `check` or at the
    end.
    """

    def __init__(self) -> None:
        self.undo: Callable[[], None] = lambda: None
        """Called before a held interrupt is raised."""
        self._held = True
        self._pending: tuple[int, FrameType | None] | None = None
        self._previous: Any = None
        self._report: Callable[[sys.UnraisableHookArgs], object] = sys.unraisablehook

    def __enter__(self) -> HeldInterrupts:
        previous = signal.getsignal(signal.SIGINT)
        if callable(previous) and threading.current_thread() is threading.main_thread():
            self._previous = previous
            signal.signal(signal.SIGINT, self._handle)
            self._report, sys.unraisablehook = sys.unraisablehook, self._hold_lost
        return self

    def _hold_lost(self, lost: sys.UnraisableHookArgs) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            self._pending = (signal.SIGINT, None)
        else:
            self._report(lost)

    def check(self) -> None:
        """Raise an interrupt that was lost inside `allowed`."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._let_through(*pending)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._pending = (number, frame)
        else:
            self._let_through(number, frame)

    def _let_through(self, number: int, frame: FrameType | None) -> None:
        # From here on what the blocks did is being undone; a second Ctrl-C may not come in between.
        self._held = True
        outer = getattr(self._previous, "__self__", None)
        (outer._let_through if isinstance(outer, HeldInterrupts) else self._previous)(number, frame)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Let interrupts through inside, and at once one that was held before."""
        self._held = False
        try:
            self.check()
            yield
        finally:
            self._held = True

    def _deliver(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._held = True
            self._previous(*pending)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is None:
            return
        sys.unraisablehook = self._report
        try:
            signal.signal(signal.SIGINT, self._previous)
            # What came until then was held. The check comes last of all, since `signal.signal` is Python code with
            # calls of its own; behind it there are returns alone, at which Python looks for no signal, so what comes
            # later comes to the caller.
            if self._pending is not None:
                self._deliver()
        except BaseException:
            # A second one may not come in between.
            self._held = True
            signal.signal(signal.SIGINT, self._handle)
            try:
                self.undo()
            finally:
                signal.signal(signal.SIGINT, self._previous)
            raise
