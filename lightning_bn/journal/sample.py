"""The statistics of all layers at one step, which stay text until they are asked for."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lightning_bn.journal.lines import decode

__all__ = ["Column", "Rows", "Sample", "columns_of"]

_VALUES = b',"values":{'
_NAMES = re.compile(rb'"([^"\\]+)":\[')


@dataclass(frozen=True)
class Column:
    """One statistic of all layers."""

    values: NDArray[np.float32]
    """One a row; NaN where there is none."""
    nans: tuple[int, ...] = ()
    """The rows whose value was NaN."""


@dataclass(frozen=True)
class Rows:
    """What the rows of samples are, which seldom changes."""

    names: tuple[str, ...]
    unjudged: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """By statistic, the rows for which its limits do not hold."""


@dataclass
class Sample:
    """A line of a run is most of the journal, and of its numbers a page shows one statistic at a time."""

    step: int
    epoch: int
    layout: Rows
    rates: dict[str, float]
    warming: dict[str, list[int]]
    """By statistic, the rows whose value says nothing yet."""
    _text: bytes
    _columns: dict[str, Column | None] = field(default_factory=dict)

    @classmethod
    def of_line(cls, line: bytes, rows: Mapping[str, Rows]) -> tuple[str, Sample]:
        """Return the stage and the sample of a line.

        Raises:
            TypeError, ValueError: it was cut short or is damaged.
        """
        head, found, text = line.partition(_VALUES)
        if not found or not line.endswith(b"}}"):
            raise ValueError("half a sample")
        fields = decode(head + b"}")
        layout = rows.get(fields["rows"]) or _nameless(text)
        return fields["stage"], cls(
            step=fields["step"],
            epoch=fields["epoch"],
            layout=layout,
            rates=fields.get("rates") or {},
            warming=fields.get("warming") or {},
            _text=text[:-2],
        )

    @property
    def rows(self) -> tuple[str, ...]:
        """The layers, in forward order."""
        return self.layout.names

    def statistics(self) -> list[str]:
        """Return the names of those that some layer has."""
        return [name.decode() for name in _NAMES.findall(self._text)]

    def column(self, statistic: str) -> Column | None:
        """Return a statistic of all layers, None where no layer has it."""
        if statistic not in self._columns:
            text = self._part(statistic)
            self._columns[statistic] = None if text is None else _column(text, len(self.rows))
        return self._columns[statistic]

    def place(self, layer: str) -> int | None:
        """Return the row of a layer, None where this sample lacks it."""
        try:
            return self.rows.index(layer)
        except ValueError:
            return None

    def value(self, statistic: str, place: int) -> float | None:
        """Return a statistic of the layer in one row."""
        text = self._part(statistic)
        cells = text.split(b",") if text else []
        if len(cells) != len(self.rows) or cells[place] == b"null":  # with a comma more or less, it is another's
            return None
        try:
            return float(cells[place].strip(b'"'))
        except ValueError:
            return None

    def _part(self, statistic: str) -> bytes | None:
        key = b'"' + statistic.encode() + b'":['
        start = self._text.find(key)
        if start < 0:
            return None
        start += len(key)
        return self._text[start : self._text.find(b"]", start)]


def _column(text: bytes, rows: int) -> Column | None:
    try:
        cells = json.loads(b"[" + text + b"]")
        values = np.array(cells, dtype=np.float32)
    except (TypeError, ValueError):
        return None
    if values.shape != (rows,):  # or of text that a damaged byte made
        return None
    return Column(values, tuple(i for i, cell in enumerate(cells) if cell == "nan") if b'"nan"' in text else ())


def _nameless(text: bytes) -> Rows:
    """Rows of a sample whose line of names is damaged: they have numbers, and the map is there."""
    first = text[text.find(b"[") + 1 : text.find(b"]")]
    return Rows(tuple(f"row {number}" for number in range(1, 2 + first.count(b","))))


def columns_of(samples: Sequence[Sample], statistic: str) -> list[Column | None]:
    """Return `Sample.column` of each sample; plain numbers are read all at once, which is several times as fast."""
    new = [sample for sample in samples if statistic not in sample._columns]
    texts = [(sample, text) for sample in new if (text := sample._part(statistic)) and b'"' not in text]
    if texts:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # numpy before 2.3 stops at what is no number, and warns
            try:
                text = b",".join(text for _, text in texts).replace(b"null", b"nan")
                numbers = np.fromstring(text, dtype=np.float32, sep=",")
            except (ValueError, DeprecationWarning):  # a damaged byte: that sample is found one by one
                numbers = np.empty(0, np.float32)
        if numbers.size == sum(len(sample.rows) for sample, _ in texts):
            ends = np.cumsum([len(sample.rows) for sample, _ in texts])
            for (sample, _), values in zip(texts, np.split(numbers, ends[:-1]), strict=True):
                sample._columns[statistic] = Column(values)
    return [sample.column(statistic) for sample in samples]
