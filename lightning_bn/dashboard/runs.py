"""Which journals lie below TensorBoard's log directory, by the names that TensorBoard gives its runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from lightning_bn.journal.lines import FILE_NAME

_REMOTE = re.compile(r"[a-zA-Z][0-9a-zA-Z.+-]*://")

MAX_DIRECTORIES = 20_000
"""How many directories are looked into; a log directory that was set to / must not keep the disk busy."""


@dataclass(frozen=True)
class Root:
    """A directory that TensorBoard was started with, and the name under which it shows the runs below."""

    name: str
    path: str


def roots_of(logdir: str | None, logdir_spec: str | None) -> list[Root]:
    """Return the directories of ``--logdir`` or ``--logdir_spec name:path,path``."""
    if not logdir_spec:
        return [Root("", _absolute(logdir))] if logdir else []
    roots = []
    for each in logdir_spec.split(","):
        name, colon, path = each.partition(":")
        named = colon and not _REMOTE.match(each) and not os.path.isabs(each)
        roots.append(Root(name if named else "", _absolute(path if named else each)))
    return roots


def find_journals(roots: list[Root]) -> dict[str, str]:
    """Return, by run, the path of its journal. What a link leads to outside of the root is left out."""
    found: dict[str, str] = {}
    for root in roots:
        for directory in _remote_directories(root.path) if is_remote(root.path) else _directories(root.path):
            place = directory[len(root.path) :].strip("/\\").replace(os.sep, "/")
            name = "/".join(part for part in (root.name, place) if part) or "."
            found[name] = f"{directory.rstrip('/')}/{FILE_NAME}"
    return dict(sorted(found.items()))


def is_remote(path: str) -> bool:
    """Return whether a path is another file system's, as in ``gs://bucket/runs``."""
    return bool(_REMOTE.match(path))


def _absolute(path: str) -> str:
    return path if is_remote(path) else os.path.realpath(os.path.expanduser(path))


def _directories(root: str) -> Iterator[str]:
    for count, (directory, below, files) in enumerate(os.walk(root, followlinks=False)):
        below.sort()
        if count >= MAX_DIRECTORIES:
            return
        if FILE_NAME in files:
            path = os.path.join(directory, FILE_NAME)
            inside = os.path.realpath(path).startswith(os.path.join(root, ""))
            if inside and os.path.isfile(path):
                yield directory


def _remote_directories(root: str) -> Iterator[str]:
    from tensorboard.compat import tf

    for count, (directory, _, files) in enumerate(tf.io.gfile.walk(root)):
        if count >= MAX_DIRECTORIES:
            return
        if FILE_NAME in files:
            yield directory
