"""Journals that are being read, each from where it was read last."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from lightning_bn.dashboard.runs import is_remote
from lightning_bn.dashboard.view import summary_of
from lightning_bn.journal.reader import JournalReader

_OPEN = 4  # journals whose numbers are kept in memory
_FRESH = 10.0  # seconds for which a list of the journals is good
_BLOCK = 1 << 22


class OpenJournal:
    """One file, and what it said so far."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.reader = JournalReader()
        self.changed = 0.0
        self.size = 0
        self.lock = threading.Lock()

    def refresh(self) -> None:
        """Read what has come since the last time; a file that has become shorter is read anew.

        Raises:
            OSError: the file can't be read.
        """
        size, changed = _size_and_time(self.path)
        if size < self.size:
            self.reader, self.size = JournalReader(), 0
        if size > self.size:
            with _open(self.path) as file:
                file.read(self.size) if is_remote(self.path) else file.seek(self.size)
                while data := file.read(_BLOCK):
                    self.size += len(data)
                    self.reader.feed(data)
        self.changed = changed


class JournalStore:
    """The journals of a log directory.

    Args:
        find: returns, by run, the path of its journal.
    """

    def __init__(self, find: Callable[[], dict[str, str]]) -> None:
        self._find = find
        self._lock = threading.Lock()
        self._paths: dict[str, str] = {}
        self._looked = -_FRESH
        self._open: OrderedDict[str, OpenJournal] = OrderedDict()
        self._summaries: dict[str, tuple[tuple[int, float], dict[str, Any]]] = {}

    def names(self) -> list[str]:
        """Return the runs, from a look that is at most ten seconds old."""
        with self._lock:
            if time.monotonic() - self._looked >= _FRESH:
                self._paths = self._find()
                self._looked = time.monotonic()
            return list(self._paths)

    def journal(self, name: str) -> OpenJournal:
        """Return a run's journal; take its lock around `OpenJournal.refresh` and every look at its reader.

        Raises:
            KeyError: there is no such run.
        """
        self.names()
        with self._lock:
            path = self._paths[name]
            journal = self._open.pop(name, None)
            if journal is None or journal.path != path:
                journal = OpenJournal(path)
            self._open[name] = journal
            while len(self._open) > _OPEN:
                self._open.popitem(last=False)
            return journal

    def summary(self, name: str) -> dict[str, Any]:
        """Return the row of the table of runs; what has not changed is not read again.

        Raises:
            KeyError: there is no such run.
            OSError: its journal can't be read.
        """
        self.names()
        state = _size_and_time(self._paths[name])
        known = self._summaries.get(name)
        if known is None or known[0] != state:
            journal = self._open.get(name) or OpenJournal(self._paths[name])
            with journal.lock:
                journal.refresh()
                known = (state, summary_of(journal.reader, name, journal.changed))
            self._summaries[name] = known
        return known[1]


def _size_and_time(path: str) -> tuple[int, float]:
    if is_remote(path):
        from tensorboard.compat import tf

        return int(tf.io.gfile.stat(path).length), 0.0
    status = os.stat(path)
    return status.st_size, status.st_mtime


def _open(path: str) -> Any:
    if is_remote(path):
        from tensorboard.compat import tf

        return tf.io.gfile.GFile(path, "rb")
    return open(path, "rb")
