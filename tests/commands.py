"""How tests call the command ``lightning-bn``: in this process, into a pipe or on a terminal."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest

from lightning_bn.cli import main


def call(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


@contextmanager
def terminal(stream: str) -> Iterator[Callable[[], str]]:
    """Let a stream of this process be a real terminal; yield what reads what was written there since."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # rows and columns
    os.set_blocking(master, False)
    redirect = {"stdout": redirect_stdout, "stderr": redirect_stderr}[stream]

    def read() -> str:
        sys.stdout.flush(), sys.stderr.flush()
        text, silent = b"", 0
        while silent < 3:  # a terminal hands on 4 kB at a time, some moments later
            try:
                text, silent = text + os.read(master, 100_000), 0
            except BlockingIOError:
                silent += 1
                time.sleep(0.01)
        return text.decode()

    with open(slave, "w", encoding="utf-8") as screen, redirect(screen):
        yield read
    os.close(master)
