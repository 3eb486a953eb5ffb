"""What a parser finds wrong with a command line, in one sentence, with what may have been meant."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NoReturn

from lightning_bn.cli.output import UsageError

__all__ = ["in_plain_words"]


def in_plain_words(command: str, parser: Any) -> Callable[..., NoReturn]:
    """Return what takes the place of a parser's ``error``, which would print its usage and words like
    ``Parser key "num_batches"``.

    Args:
        command: the parser's command; empty for the one of all commands.
        parser: argparse's or jsonargparse's.
    """

    def error(message: str, *_: object) -> NoReturn:
        said = " ".join(_reworded(message, parser.format_help()).split())
        help = " ".join(part for part in ("lightning-bn", _named(message) or command, "--help") if part)
        raise UsageError(f"{said if said.endswith('?') else said.rstrip('.') + '.'} All options: {help}")

    return error


# The second is that of older versions of jsonargparse, which tell of the first alone.
_MISSING = re.compile(r'arguments are required: (.*)|Key "([^"]+)" is required')


def _reworded(message: str, help: str) -> str:
    if missing := _MISSING.search(message):
        # jsonargparse names an argument by its command and destination: inspect.checkpoints.
        names = [name.rpartition(".")[2] for name in (missing[1] or missing[2]).split(", ")]
        words = [
            "a checkpoint" if name in ("checkpoints", "CKPT") else "a run" if name in ("runs", "RUN") else name
            for name in names
        ]
        needed = [word if " " in word or word.startswith("--") else f"--{word}" for word in words]
        command = _named(message)
        return f"{command + ' needs' if command else 'it takes'} {' and '.join(needed)}"
    if unknown := re.search(r"unrecognized arguments: (.*)", message, re.IGNORECASE):
        near = get_close_matches(unknown[1].split()[0].partition("=")[0], re.findall(r"--\w+", help), n=1)
        return f"there is no option {unknown[1]}" + (f". Did you mean {near[0]}?" if near else "")
    message = re.sub(
        r'Parser key "([^"]+)":|argument (--\w+):', lambda named: f"{named[2] or '--' + named[1]}:", message
    )
    for type_, kind in (("int", "a whole number"), ("float", "a number")):
        message = re.sub(rf"Expected a <class '{type_}'>. Got value: (.*)", rf"it takes {kind}, not \1", message)
        optional = rf"Does not validate against any of the Union.*<class '{type_}'>.*Given value: (.*)"
        message = re.sub(optional, rf"it takes {kind}, not \1", message, flags=re.DOTALL)
    return message


def _named(message: str) -> str:
    """Return the command that the names of missing arguments begin with."""
    missing = _MISSING.search(message)
    command, dot, _ = (missing[1] or missing[2]).partition(".") if missing else ("", "", "")
    return command if dot else ""
