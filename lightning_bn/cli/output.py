"""What all commands share: how they print, and how they end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from lightning_bn.tables import text_table

OK, FINDINGS, USAGE = 0, 1, 2
INTERRUPTED = 130  # as shells have it
_COLOURS = {"error": "1;31", "warning": "1;33", "info": "36"}


class RefusedError(Exception):
    """The command can't do what was asked, and nothing was changed; the user's to mend, so that no traceback is
    shown."""


class UsageError(Exception):
    """Invalid command line."""


def coloured(word: str, colour: str) -> str:
    """Return the word in colour, where a person reads it on a terminal and has not set NO_COLOR."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return word
    return f"\033[{_COLOURS[colour]}m{word}\033[0m"


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Print aligned columns: the first `left` to the left, the others, which are numbers, to the right."""
    print("\n".join(text_table(header, rows, left=left)))
