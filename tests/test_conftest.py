"""What the tests' own set-up promises."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Event

import pytest


def wait(ready: Event) -> None:
    ready.set()
    time.sleep(60)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_termination_is_one_failure() -> None:
    """A SIGTERM fails the test in whose time it comes; a process that a test forked ends of it."""
    with pytest.raises(pytest.fail.Exception, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    child = fork.Process(target=wait, args=(ready,))
    child.start()
    ready.wait(30)  # a signal that comes in the middle of a fork is lost where Python has a handler
    child.terminate()
    child.join(30)
    assert child.exitcode == -signal.SIGTERM
