"""The form of a line of the journal; `docs/journal.md` tells what each kind of line holds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import compress
from typing import Any

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


def encode_numbers(values: Iterable[float], has_value: Iterable[bool] | None = None) -> str:
    """Return a JSON list of numbers with five significant digits; what has no value becomes null.

    Example:
        >>> encode_numbers([1 / 3, 0.0, float("nan"), 2e-30], [True, False, True, True])
        '[0.33333,null,"nan",2e-30]'
    """
    numbers = tuple(values)
    has = b"\1" * len(numbers) if has_value is None else bytes(has_value)
    shown = tuple(compress(numbers, has))
    text = _form(has) % shown
    return text if math.isfinite(sum(shown)) else _NO_NUMBER.sub(r'"\g<0>"', text)


@lru_cache(maxsize=256)
def _form(has_value: bytes) -> str:
    """A format string for a list: one call for all its numbers is many times as fast as one for each."""
    return "[" + ",".join("%.5g" if has else "null" for has in has_value) + "]"


_NO_NUMBER = re.compile("nan|-?inf")
_NUMBER = (int, float)
# What a reader relies on. A damaged byte may leave JSON of another form; such a line is passed over.
_NEEDED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("finding", "unseen", "epoch", "validation", "modes", "averages", "recalibration"), ("step",)),
    **dict.fromkeys(("start", "end", "note", "rule"), ("step",)),
    **dict.fromkeys(("channels", "histograms"), ("step", "layers")),
    "episode": ("layer", "statistic", "first"),
    "rows": ("id", "rows"),
    "sample": ("stage", "step", "epoch", "rows"),
}
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("step", "epoch", "first", "last", "version"), int),
    **dict.fromkeys(("time", "peak", "limit", "before", "after", "low", "high", "healthy"), (*_NUMBER, str)),
    **dict.fromkeys(("stage", "layer", "statistic", "level", "code", "text", "title", "name", "label"), str),
    **dict.fromkeys(("metrics", "rates", "warming", "unjudged", "report"), dict),
    **dict.fromkeys(("statistics", "eval", "histogram_edges"), list),
    "layers": (dict, list),
}
_OF_KIND: dict[str, dict[str, type]] = {
    "layers": {"layers": list},
    "finding": {"layers": list},
    **{key: {"layers": dict} for key in ("channels", "histograms", "unseen")},
    "rows": {"rows": list},
}


def decode(line: bytes) -> dict[str, Any]:
    """Return what a line holds.

    Raises:
        ValueError: a kill cut it short, it is damaged, or it is not of this format.
    """
    fields = json.loads(line, parse_constant=_finite, parse_float=_finite)
    if not isinstance(fields, dict) or not isinstance(fields.get("kind"), str) or not _is_of_form(fields):
        raise ValueError(f"not a line of a journal: {line[:80]!r}")
    return fields


def _is_of_form(fields: Mapping[str, Any]) -> bool:
    kind = fields["kind"]
    described = [each for name in ("layers", "statistics") if kind == name for each in fields.get(name, ())]
    return (
        all(fields.get(name) is not None for name in _NEEDED.get(kind, ()))
        and all(_fits(each, {**_TYPES, **_OF_KIND.get(kind, {})}) for each in (fields, *described))
        and all(isinstance(each.get("name"), str) for each in described)
    )


def _fits(fields: Any, types: Mapping[str, type | tuple[type, ...]]) -> bool:
    return isinstance(fields, dict) and all(
        value is None or name not in types or isinstance(value, types[name]) for name, value in fields.items()
    )


def _finite(text: str) -> float:
    """Return a number; NaN and infinity are not JSON, nor is one beyond the largest, which would become infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number that was written")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
