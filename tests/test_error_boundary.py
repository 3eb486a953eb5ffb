"""The boundary between a run and what watches it."""

from __future__ import annotations

import logging
import os
import pickle

import pytest

from lightning_bn.error_boundary import RERAISE, UNBOUNDED, ErrorBoundary, guarded, theirs, users_mistake


@pytest.fixture
def _as_for_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RERAISE)


class Watcher:
    def __init__(self, **options: object) -> None:
        self.seen = 0
        self._boundary = ErrorBoundary("Watcher", self.close, **options)

    def close(self) -> None:
        self.seen = -1

    @guarded
    def see(self, value: int) -> int:
        self.seen += 1 // value
        return self.seen


def test_the_suite_runs_with_errors_that_pass() -> None:
    """What users are spared is never hidden from these tests, nor from the processes that they start."""
    assert os.environ.get(RERAISE)
    with pytest.raises(ZeroDivisionError):
        Watcher().see(0)


@pytest.mark.usefixtures("_as_for_users")
def test_an_error_closes_the_observer_and_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """The caller gets None, then and from then on; the log has the whole traceback."""
    watcher = Watcher()
    assert watcher.see(1) == 1
    with caplog.at_level(logging.ERROR), pytest.warns(UserWarning, match="Watcher has stopped.*ZeroDivisionError"):
        assert watcher.see(0) is None
    assert "in see" in caplog.text
    assert watcher.see(1) is None
    assert watcher.seen == -1
    watcher._boundary.reopen()
    assert watcher.see(1) == 0


@pytest.mark.usefixtures("_as_for_users")
def test_a_part_is_lost_alone() -> None:
    """The observer goes on without the table."""
    boundary = ErrorBoundary("Watcher")
    with pytest.warns(UserWarning, match="goes on without the table: OSError: full"):
        assert boundary.attempt("the table", fail, OSError("full")) is None
    assert boundary.attempt("the table", fail, OSError("full")) is None  # a second warning would be an error
    assert boundary.attempt("the rest", int, "3") == 3
    assert boundary.attempt("the rest", dict, part=1, function=2) == {"part": 1, "function": 2}


@pytest.mark.usefixtures("_as_for_users")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserWarning("w"), LookupError("l"), users_mistake(OSError())])
def test_what_passes(error: BaseException) -> None:
    """An interrupt, a warning that the user's filters raise, an intended error, and a user's own mistake."""
    with pytest.raises(type(error)):
        ErrorBoundary("Watcher", intended=(LookupError,)).attempt("", fail, error)


@pytest.mark.usefixtures("_as_for_users")
def test_a_users_function_raises_what_it_raises() -> None:
    """It is no fault of the observer that called it."""

    def choose() -> None:
        with theirs():
            raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        ErrorBoundary("Watcher").attempt("", choose)


@pytest.mark.usefixtures("_as_for_users")
def test_where_the_traceback_is_kept() -> None:
    """`keep` says where; if it fails too, the log has it, and the warning still comes."""
    boundary = ErrorBoundary("Watcher")
    boundary.reopen(lambda observer, part, traceback: f"in a file, of {len(traceback) > 50}")
    with pytest.warns(UserWarning, match="in a file, of True"):
        boundary.attempt("this", fail, OSError())
    boundary.reopen(lambda *_: fail(OSError("no place")))
    with pytest.warns(UserWarning, match="in the log"):
        boundary.attempt("this", fail, OSError())


@pytest.mark.usefixtures("_as_for_users")
def test_a_failure_to_close_is_no_failure_of_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """Hooks that could not be removed do nothing from then on."""
    boundary = ErrorBoundary("Watcher", lambda: fail(OSError("stuck")))
    with pytest.warns(UserWarning, match="KeyError"):
        boundary.attempt("", fail, KeyError("first"))
    assert "stuck" in caplog.text
    assert boundary.closed


def test_a_copy_knows_no_run() -> None:
    """A boundary travels with its callback to other processes, and the place of its tracebacks does not."""
    boundary = ErrorBoundary("Watcher")
    boundary.reopen(lambda *_: None)
    assert pickle.loads(pickle.dumps(boundary)).observer == "Watcher"


def test_an_unbounded_hook_is_the_function_itself() -> None:
    """Outside of callbacks nothing stands between a caller and an error."""
    assert UNBOUNDED.guard(fail) is fail


def fail(error: BaseException) -> None:
    raise error
