"""What a parser finds wrong with a command line, in one sentence, with what may have been meant."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any, NoReturn

from lightning_bn.cli.output import UsageError

__all__ = ["speak_plainly"]


def speak_plainly(parser: Any, command: str = "") -> None:
    """Have a parser raise a `UsageError` of one sentence where it would print its usage and words like
    ``Parser key "num_batches"``.

    Args:
        parser: argparse's or jsonargparse's.
        command: the parser's command; empty for the one of all commands.
    """

    def error(message: str, *_: object) -> NoReturn:
        said = " ".join(_reworded(message, parser.format_help()).split())
        help = " ".join(part for part in ("lightning-bn", _command(_missing(message)) or command, "--help") if part)
        raise UsageError(f"{said if said.endswith('?') else said.rstrip('.') + '.'} All options: {help}")

    parser.error = error


def _reworded(message: str, help: str) -> str:
    if missing := _missing(message):
        names = [name.rpartition(".")[2] for name in missing]
        words = [
            "a checkpoint" if name in ("checkpoints", "CKPT") else "a run" if name in ("runs", "RUN") else name
            for name in names
        ]
        needed = [word if " " in word or word.startswith("--") else f"--{word}" for word in words]
        command = _command(missing)
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


def _missing(message: str) -> list[str]:
    """Return the arguments that are missing. jsonargparse names one by its command and destination, as in
    ``inspect.checkpoints``, and in older versions tells of the first alone."""
    found = re.search(r'arguments are required: (.*)|Key "([^"]+)" is required', message)
    return (found[1] or found[2]).split(", ") if found else []


def _command(missing: list[str]) -> str:
    """Return the command that the names of missing arguments begin with, if they do."""
    return missing[0].partition(".")[0] if missing and "." in missing[0] else ""
