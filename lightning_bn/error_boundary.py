"""The boundary of an observer: what goes wrong inside of it never reaches the run that it watches."""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist

P = ParamSpec("P")
T = TypeVar("T")

RERAISE = "LIGHTNING_BN_RERAISE"
"""Name of an environment variable: where it is set, as in this package's own tests, boundaries let every error pass."""

Keep: TypeAlias = Callable[[str, str, str], str | None]

_THEIRS = "_lightning_bn_theirs"
_log = logging.getLogger("lightning_bn")


class ErrorBoundary:
    """Stands between the hooks of Lightning and torch and an observer's code.

    An error costs the part of the observer in which it was raised, a rule, a layer or a file, or else the observer. It
    is reported once. Two kinds of errors pass: the `intended` ones, and those of a user's own function, see `theirs`.

    Args:
        observer: who watches, as the user wrote it.
        close: removes the observer's hooks, and takes in what it has seen so far; called when it can't go on.
        intended: classes of errors that are meant for the user.

    Attributes:
        closed: whether the observer has failed; from then on it does nothing.
    """

    def __init__(
        self,
        observer: str,
        close: Callable[[], object] | None = None,
        *,
        intended: tuple[type[Exception], ...] = (),
    ) -> None:
        self.observer = observer
        self.closed = False
        self._absent = False  # whether it comes to no meeting of ranks any more
        self._close = close
        # A warning is raised only where the user's filters say so.
        self._intended: tuple[type[Exception], ...] = (Warning, *intended)
        self._keep: Keep | None = None
        self._lost: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_keep": None}  # which knows the run's Trainer

    def reopen(self, keep: Keep | None = None) -> None:
        """Begin another run: what failed in the last one is tried again.

        Args:
            keep: takes the observer, the part and the traceback, and returns where that is kept; without it, or where
                it returns None, the log ``lightning_bn`` gets it.
        """
        self.closed, self._absent, self._keep = False, False, keep
        self._lost.clear()

    def attempt(self, part: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return ``function(*args, **kwargs)``; None if it fails, or if this part or the observer failed before.

        Args:
            part: what of the observer is lost by a failure, as the report names it; empty: the observer itself.
            function: to be called.
            args: its arguments.
            kwargs: its arguments.
        """
        if self.closed or part in self._lost:
            return None
        try:
            return function(*args, **kwargs)
        except Exception as error:
            self.catch(part, error)
            return None

    def attend(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return ``function(*args, **kwargs)``, in which ranks meet, also where the observer has failed: it has to tell
        the others. None if it fails, and from then on."""
        if self._absent:
            return None
        try:
            return function(*args, **kwargs)
        except Exception as error:
            self._absent = True
            self.catch("", error)
            return None

    def catch(self, part: str, error: Exception) -> None:
        """Report an error that came inside, and go on without the part; raise it again if it is to pass."""
        if isinstance(error, self._intended) or hasattr(error, _THEIRS) or os.environ.get(RERAISE):
            raise error
        if not self.closed:
            self.lose(part, error)

    def guard(self, function: Callable[P, T]) -> Callable[P, T | None]:
        """Return `function` as a hook for somebody else to call: its error closes the observer."""
        if self is UNBOUNDED:
            return function

        @wraps(function)
        def safe(*args: P.args, **kwargs: P.kwargs) -> T | None:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            return self.attempt("", function, *args, **kwargs)

        return safe

    def lose(self, part: str, error: Exception) -> None:
        """Report the error, and go on without the part; an empty one closes the observer."""
        if part:
            self._lost.add(part)
        else:
            self._shut()
        self._report(part, error)

    def stop(self, reason: str) -> None:
        """Close the observer, and warn of the reason."""
        if not self.closed:
            self._shut()
            warnings.warn(f"{self.observer} has stopped, and the run goes on without it: {reason}", stacklevel=2)

    def _shut(self) -> None:
        try:
            if self._close is not None:
                self._close()
        except Exception:  # hooks that are still there do nothing from now on
            _log.exception("%s could not remove its hooks", self.observer)
        finally:
            self.closed = True  # not before: what waited is taken in by its own attempts

    def _report(self, part: str, error: Exception) -> None:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        place = None
        try:
            place = self._keep(self.observer, part, text) if self._keep is not None else None
        except Exception:  # the place may be what failed
            _log.exception("the traceback of %s could not be kept", self.observer)
        if place is None:
            place = "in the log 'lightning_bn'"
            _log.error("%s: %s\n%s", self.observer, part or "closed", text)
        on = f"on rank {dist.get_rank()}; " if dist.is_available() and dist.is_initialized() else ""
        without = f"goes on without {part}" if part else "has stopped, and the run goes on without it"
        last = traceback.format_exception_only(type(error), error)[-1].strip()
        warnings.warn(
            f"{self.observer} {without}: {last} ({on}nothing else is affected; the whole traceback is {place})",
            stacklevel=2,
        )


UNBOUNDED = ErrorBoundary("")
"""For objects that nobody has given a boundary: `guarded` calls their methods as they are."""


F = TypeVar("F", bound=Callable[..., Any])
E = TypeVar("E", bound=Exception)


def guarded(method: F) -> F:
    """Make a method of an observer safe for whoever calls it: an error closes the observer, by its ``_boundary``, and
    the method returns None, as it does from then on."""

    @wraps(method)
    def safe(self: Any, *args: Any, **kwargs: Any) -> Any:
        boundary = self._boundary
        # What torch.compile traces is left as it was.
        if boundary is UNBOUNDED or torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        if boundary.closed:
            return None
        try:  # `attempt`, without a call of its own: each layer has hooks
            return method(self, *args, **kwargs)
        except Exception as error:
            boundary.catch("", error)

    return cast("F", safe)


def users_mistake(error: E) -> E:
    """Mark an error as meant for the user, who is to read it at once: it passes every boundary. Returns it."""
    setattr(error, _THEIRS, True)
    return error


@contextmanager
def theirs() -> Iterator[None]:
    """Call a user's own function inside: its errors are the user's, and pass every boundary."""
    try:
        yield
    except Exception as error:
        users_mistake(error)
        raise
