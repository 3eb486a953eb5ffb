"""What the tests' own set-up promises."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_termination_is_one_failure() -> None:
    """A SIGTERM fails the test in whose time it comes; a process that a test forked ends of it."""
    with pytest.raises(pytest.fail.Exception, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join(30)
    assert child.exitcode == -signal.SIGTERM
