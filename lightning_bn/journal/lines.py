"""The form of a line of the journal; `docs/journal.md` tells what each kind of line holds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["FILE_NAME", "VERSION", "decode", "encode", "encode_numbers", "encode_object"]

VERSION = 1
"""Raised when a reader of today would misread what is written; new kinds and new fields don't raise it."""

FILE_NAME = "lightning_bn.jsonl"


def encode(kind: str, fields: Mapping[str, Any], **ready: str) -> str:
    """Return a line, without its end.

    JSON has no NaN and no infinity: they become the strings "nan", "inf", "-inf".

    Args:
        kind: of the line.
        fields: plain numbers, strings, lists and dicts.
        ready: further fields, whose values are JSON already.
    """
    line = json.dumps({"kind": kind, **_plain(fields)}, separators=(",", ":"), allow_nan=False)
    return line[:-1] + "".join(f',"{name}":{value}' for name, value in ready.items()) + "}"


def encode_object(members: Iterable[tuple[str, str]]) -> str:
    """Return a JSON object of names and values that are JSON already."""
    return "{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in members) + "}"


def encode_numbers(values: Iterable[float | None]) -> str:
    """Return a JSON list of numbers with five significant digits; None, where there is no value, becomes null.

    Example:
        >>> encode_numbers([1 / 3, None, float("nan"), 2e-30])
        '[0.33333,null,"nan",2e-30]'
    """
    return "[" + ",".join([_number(value) for value in values]) + "]"


def decode(line: bytes) -> dict[str, Any]:
    """Return what a line holds.

    Raises:
        ValueError: a kill cut it short, or it is not of this format.
    """
    fields = json.loads(line)
    if not isinstance(fields, dict) or not isinstance(fields.get("kind"), str):
        raise ValueError(f"not a line of a journal: {line[:80]!r}")
    return fields


def _number(value: float | None) -> str:
    if value is None:
        return "null"
    return f"{value:.5g}" if math.isfinite(value) else f'"{value}"'


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
