"""Callbacks that only watch: whatever goes wrong inside of them, the fit goes on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import wraps
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, ref

from lightning_bn.callbacks.both_lightnings import Callback, MisconfigurationException, Trainer
from lightning_bn.callbacks.run_journal import journal_of
from lightning_bn.callbacks.terminal import ClosingBlock
from lightning_bn.error_boundary import ErrorBoundary, Keep, guarded
from lightning_bn.ranks.collective import LostRankError, Ranks

C = TypeVar("C", bound=type[Callback])
F = TypeVar("F", bound=Callable[..., Any])

_MEETING = "_lightning_bn_meeting"
_BLOCKS: WeakKeyDictionary[Any, ClosingBlock] = WeakKeyDictionary()

_HOOKS = [name for name in dir(Callback) if name.startswith("on_")] + [
    "setup",
    "teardown",
    "state_dict",
    "load_state_dict",
]


def observing(callback: C) -> C:
    """Decorate a class of callbacks: what its hooks raise is caught by the object's ``_boundary``, which is reopened
    in each ``setup``. What they have to say at the end of a run is said in one block."""
    for name in _HOOKS:
        own = vars(callback).get(name)
        if (own is not None and not hasattr(own, _MEETING)) or name == "setup":
            method = guarded(getattr(callback, name))
            setattr(callback, name, _reopening(method) if name == "setup" else method)
    for name in ("teardown", "on_exception"):
        setattr(callback, name, _leaving(getattr(callback, name)))
    return callback


def meeting(hook: F) -> F:
    """Decorate a hook at which ranks meet: it is called on a rank too on which the callback has failed, and passes the
    rest of what it does to the callback's boundary."""

    @wraps(hook)
    def attended(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._boundary.attend(hook, self, *args, **kwargs)

    setattr(attended, _MEETING, True)
    return cast("F", attended)


def meet(boundary: ErrorBoundary, ranks: Ranks, function: Callable[..., object], *arguments: Any) -> None:
    """Call `function`, in which `ranks` meet, within the boundary; on a rank where the observer has failed, tell those
    that wait."""
    if boundary.closed:
        ranks.fail(RuntimeError("it has stopped there"))
    else:
        boundary.attempt("", function, *arguments)


def begin_together(boundary: ErrorBoundary, ranks: Ranks, function: Callable[[], object]) -> None:
    """Call `function` within the boundary once all `ranks` have come here; on none, where the observer has failed on
    one. Where it fails on one rank on the way, all know at the end."""

    def begin() -> None:
        ranks.share(None)
        ranks.each(function)

    meet(boundary, ranks, begin)


def boundary_of(
    observer: str, close: Callable[[], object] | None = None, *, intended: tuple[type[Exception], ...] = ()
) -> ErrorBoundary:
    """Return the boundary of a callback. A lost rank is no fault of the callback: the fit is over anyway; that it has
    failed on another rank stops it on this one."""
    return ErrorBoundary(observer, close, intended=(MisconfigurationException, LostRankError, *intended))


def not_logged(callback: str, monitor: str, logged: Iterable[str]) -> str:
    """Return what is wrong with ``monitor=`` where validation logs other metrics."""
    return f"{callback}(monitor={monitor!r}): validation logs no such metric; it logs {', '.join(logged) or 'none'}."


def check_logged(callback: str, monitor: str, logged: Collection[str]) -> None:
    """Raise at the end of the sanity check unless it has logged `monitor`. If it has logged nothing, the module does
    not log there; a mistake then shows at the first validation, when it is too late to end the fit.

    Raises:
        MisconfigurationException: with the metrics that there are.
    """
    if logged and monitor not in logged:
        raise MisconfigurationException(not_logged(callback, monitor, logged))


def _reopening(setup: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(setup)
    def reopened(self: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._boundary.reopen(_journal_keeper(trainer))
        self._boundary.attempt("the closing block", lambda: _BLOCKS.setdefault(trainer, ClosingBlock()).join(self))
        setup(self, trainer, *args, **kwargs)

    return reopened


def _leaving(end: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(end)
    def left(self: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        try:
            end(self, trainer, *args, **kwargs)
        finally:
            if trainer in _BLOCKS:
                _BLOCKS[trainer].leave(self, trainer)

    return left


def _journal_keeper(trainer: Trainer) -> Keep:
    whose = ref(trainer)

    def keep(observer: str, part: str, traceback: str) -> str | None:
        running = whose()
        return None if running is None else journal_of(running).failure(running, observer, part, traceback)

    return keep
