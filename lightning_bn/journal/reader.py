"""Reads a journal, also one that is still being written or that was cut short."""

from __future__ import annotations

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_bn.grids import Grid
from lightning_bn.journal.lines import VERSION, decode

_VALUES = b',"values":{'
_NAMES = re.compile(rb'"([^"\\]+)":\[')
_SAMPLE = b'{"kind":"sample",'
_BLOCK = 1 << 20  # bytes of samples that are read at once

# By statistic: at which of some samples it has a value, and the values.
_Cells: TypeAlias = dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]]

# Of these the last line says all.
_WHOLE = ("journal", "statistics", "layers")


class JournalRows(NamedTuple):
    """What the rows of samples are, which seldom changes; by statistic, the rows for which its limits do not hold."""

    names: tuple[str, ...]
    unjudged: Mapping[str, frozenset[int]]


class JournalColumn(NamedTuple):
    """One statistic of all layers, (R,): NaN where there is none, and in the rows `nans`, whose value was NaN."""

    values: NDArray[np.float32]
    nans: tuple[int, ...] = ()


@dataclass(eq=False)
class JournalSample:
    """The statistics of all layers at one step, which stay text until one of them is asked for."""

    step: int
    epoch: int
    layout: JournalRows
    rates: dict[str, float]
    warming: dict[str, list[int]]
    """By statistic, the rows whose value says nothing yet."""
    _text: bytes
    _columns: dict[str, JournalColumn | None] = field(default_factory=dict)

    @classmethod
    def of_line(cls, line: bytes, rows: Mapping[str, JournalRows]) -> tuple[str, JournalSample]:
        """Return the stage and the sample of a line.

        Raises:
            TypeError, ValueError: it was cut short or is damaged.
        """
        head, found, text = line.partition(_VALUES)
        if not found or not line.endswith(b"}}"):
            raise ValueError("half a sample")
        fields = decode(head + b"}")
        layout = rows.get(fields["rows"]) or _nameless(text)
        rates, warming = fields.get("rates") or {}, fields.get("warming") or {}
        return fields["stage"], cls(fields["step"], fields["epoch"], layout, rates, warming, text[:-2])

    @property
    def rows(self) -> tuple[str, ...]:
        """The layers, in forward order."""
        return self.layout.names

    @property
    def statistics(self) -> list[str]:
        """The names of those that some layer has."""
        return [name.decode() for name in _NAMES.findall(self._text)]

    def column(self, statistic: str) -> JournalColumn | None:
        """Return a statistic of all layers, None where no layer has it."""
        if statistic not in self._columns:
            text = self._part(statistic)
            self._columns[statistic] = None if text is None else _column(text, len(self.rows))
        return self._columns[statistic]

    def _part(self, statistic: str) -> bytes | None:
        key = b'"' + statistic.encode() + b'":['
        start = self._text.find(key)
        return None if start < 0 else self._text[start + len(key) : self._text.find(b"]", start)]


@dataclass
class JournalReader:
    """What the lines of a journal say, as far as they have come: `feed` takes bytes as they are read.

    A run that is resumed writes again what an earlier one had written behind the checkpoint; the later lines count. A
    line that can't be read is passed over.

    Example:
        >>> reader = JournalReader()
        >>> reader.feed(b'{"kind":"epoch","step":0,"epoch":0}\\n{"kind":"epo')
        >>> reader.events["epoch"]
        [{'kind': 'epoch', 'step': 0, 'epoch': 0}]
    """

    samples: dict[str, list[JournalSample]] = field(default_factory=lambda: defaultdict(list))
    """By stage."""
    events: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    """By kind, every other line, in the order of the file."""
    skipped: int = 0
    """Lines that could not be read."""
    _rest: bytes = b""
    _rows: dict[str, JournalRows] = field(default_factory=dict)

    def feed(self, data: bytes) -> None:
        """Take in what comes next in the file; half a line waits for the other half."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.strip():
                self._take(line)

    def last_step(self) -> int:
        """Return the highest step that anything tells of."""
        steps = [samples[-1].step for samples in self.samples.values() if samples]
        steps += [int(event["step"]) for events in self.events.values() for event in events[-1:] if "step" in event]
        return max(steps, default=0)

    def whole(self, kind: str) -> dict[str, Any]:
        """Return the one line that counts of a kind that is written anew as a whole; empty where there is none."""
        events = self.events.get(kind)
        return events[-1] if events else {}

    @classmethod
    def of_file(cls, path: Path) -> JournalReader:
        """Read a whole file."""
        reader = cls()
        with path.open("rb") as file:
            while data := file.read(1 << 22):
                reader.feed(data)
        return reader

    def _take(self, line: bytes) -> None:
        try:
            if line.startswith(_SAMPLE):
                self._append(*JournalSample.of_line(line, self._rows))
            else:
                self._sort_in(decode(line))
        except (KeyError, TypeError, ValueError, OverflowError):
            self.skipped += 1

    def _sort_in(self, fields: dict[str, Any]) -> None:
        kind = fields["kind"]
        if kind == "rows":
            unjudged = {name: frozenset(map(int, places)) for name, places in (fields.get("unjudged") or {}).items()}
            self._rows[fields["id"]] = JournalRows(tuple(map(str, fields["rows"])), unjudged)
            return
        if kind == "start":
            self._forget_after(fields["step"], everything=not fields.get("resumed"))
        if kind in _WHOLE:
            self.events[kind].clear()
        self.events[kind].append(fields)

    def _append(self, stage: str, sample: JournalSample) -> None:
        samples = self.samples[stage]
        while samples and samples[-1].step >= sample.step:
            samples.pop()
        samples.append(sample)

    def _forget_after(self, step: int, *, everything: bool) -> None:
        """Leave out what a run wrote behind the step at which another takes it up, or which begins anew."""
        for stage, samples in self.samples.items():
            self.samples[stage] = [] if everything else [each for each in samples if each.step <= step]
        for kind, events in self.events.items():
            if kind not in ("journal", "start"):
                self.events[kind] = [] if everything else [each for each in events if each.get("step", 0) <= step]

    def snapshot(self) -> JournalReader:
        """Return a reader of what has come so far, which no later line changes."""
        return replace(self, samples={stage: list(samples) for stage, samples in self.samples.items()})

    def version_is_known(self) -> bool:
        """Return whether this reader knows the format in which the file was written."""
        return int(self.whole("journal").get("version", VERSION)) <= VERSION


def _column(text: bytes, rows: int) -> JournalColumn | None:
    values = _numbers(text)
    nans = tuple(row for row, cell in enumerate(text.split(b",")) if cell == b'"nan"') if b'"nan"' in text else ()
    return JournalColumn(values, nans) if values.shape == (rows,) else None  # a damaged byte makes text, or a comma


def _nameless(text: bytes) -> JournalRows:
    """Rows of a sample whose line of names is damaged: they have numbers, and the map is there."""
    first = text[text.find(b"[") + 1 : text.find(b"]")]
    return JournalRows(tuple(f"row {number}" for number in range(1, 2 + first.count(b","))), {})


def _columns_of(samples: Sequence[JournalSample], statistic: str) -> list[JournalColumn | None]:
    """`JournalSample.column` of each sample; plain numbers are read all at once, which is several times as fast."""
    new = [sample for sample in samples if statistic not in sample._columns]
    texts = [(sample, text) for sample in new if (text := sample._part(statistic)) and b'"' not in text]
    if texts:
        numbers = _numbers(b",".join(text for _, text in texts))
        ends = np.cumsum([len(sample.rows) for sample, _ in texts])
        if numbers.size == ends[-1]:
            for (sample, _), values in zip(texts, np.split(numbers, ends[:-1]), strict=True):
                sample._columns[statistic] = JournalColumn(values)
    return [sample.column(statistic) for sample in samples]


def _numbers(text: bytes) -> NDArray[np.float32]:
    """The numbers of a text; none where a damaged byte is among them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # numpy before 2.3 stops at what is no number, and warns
        try:
            return np.fromstring(text.replace(b"null", b"nan").replace(b'"', b""), dtype=np.float32, sep=",")
        except (ValueError, DeprecationWarning):
            return np.empty(0, np.float32)


def grid_of_layers(samples: Sequence[JournalSample], statistic: str) -> Grid:
    """Return a statistic of all layers that have it, in forward order, at every sample of a stage that has it."""
    pairs = zip(samples, _columns_of(samples, statistic), strict=True)
    having = [(sample, column) for sample, column in pairs if column]
    # The newest sample has the layers in forward order; those that it lacks come behind.
    orders = dict.fromkeys(sample.rows for sample, _ in reversed(having))
    layers = dict.fromkeys(name for rows in orders for name in rows)
    places = {name: place for place, name in enumerate(layers)}
    into = {rows: np.array([places[name] for name in rows]) for rows in orders}
    values = np.full((len(layers), len(having)), np.nan, dtype=np.float32)
    nans, warming = np.zeros(values.shape, dtype=bool), np.zeros(values.shape, dtype=bool)
    for at, (sample, column) in enumerate(having):
        rows = into[sample.rows]
        values[rows, at] = column.values
        if column.nans:
            nans[rows[list(column.nans)], at] = True
        if warm := [row for row in sample.warming.get(statistic, ()) if 0 <= row < len(rows)]:
            warming[rows[warm], at] = True
    kept: NDArray[np.bool_] = np.any(~np.isnan(values) | nans, axis=1)
    steps = np.array([sample.step for sample, _ in having], dtype=np.int64)
    names = tuple(name for name, keep in zip(layers, kept, strict=True) if keep)
    return Grid(names, steps, steps, values[kept], nans[kept], warming[kept], len(having))


def grids_of_layer(samples: Sequence[JournalSample], layer: str) -> dict[str, Grid]:
    """Return, by statistic, the grid of one layer; the other layers' numbers are passed over."""
    found: dict[str, list[tuple[NDArray[Any], ...]]] = defaultdict(list)
    for layout, block in _alike(samples):
        if layer not in layout.names:
            continue
        row, rows = layout.names.index(layer), len(layout.names)
        texts = [sample._text for sample in block]
        cells = _cells_of_row(texts, row, rows)
        own = np.array([sample.step for sample in block], dtype=np.int64)
        warm = [(at, sample.warming) for at, sample in enumerate(block) if sample.warming]
        for name, (places, numbers) in (_cells_one_by_one(texts, row, rows) if cells is None else cells).items():
            warms = np.isin(places, [at for at, by_name in warm if row in by_name.get(name, ())])
            found[name].append((own[places], numbers, warms))
    grids = {}
    for name, parts in found.items():
        steps, values, warming = map(np.concatenate, zip(*parts, strict=True))
        grids[name] = Grid((layer,), steps, steps, values[None], np.isnan(values)[None], warming[None], len(steps))
    return grids


def _alike(samples: Sequence[JournalSample]) -> Iterator[tuple[JournalRows, list[JournalSample]]]:
    """Cut the samples where their rows change, and into blocks that fit into memory several times over."""
    for layout, group in groupby(samples, attrgetter("layout")):
        left = iter(group)
        while block := list(islice(left, 1)):
            yield layout, block + list(islice(left, _BLOCK // max(1, len(block[0]._text))))


def _cells_of_row(texts: Sequence[bytes], row: int, rows: int) -> _Cells | None:
    """Return, by statistic, where a row has a value and which; None where the texts have not all the same statistics,
    or one is damaged.

    All texts are read at once: where their commas and brackets are tells where the row's cells are.
    """
    names = _NAMES.findall(texts[0])
    data = np.frombuffer(b",".join((b"", *texts, b"")), dtype=np.uint8)
    flat = np.flatnonzero((data == ord(",")) | (data == ord("[")) | (data == ord("]")))[1:]
    shape = (len(texts), len(names), rows + 2)
    if not names or flat.size != math.prod(shape):
        return None
    marks = flat.reshape(shape)
    # Each statistic is `,"name":[cell,...,cell],`, of which the first comma is also the last one of that before.
    if np.any(data[marks] != np.frombuffer(b"[" + b"," * (rows - 1) + b"],", dtype=np.uint8)):
        return None
    for place, name in enumerate(names):
        head = np.frombuffer(b',"' + name + b'":', dtype=np.uint8)
        if np.any(data[marks[:, place, :1] + np.arange(-head.size, 0)] != head):
            return None
    first, last = marks[:, :, row] + 1, marks[:, :, row + 1]
    kept = data[first] != ord("n")  # a null
    inside = np.zeros(data.size + 1, dtype=np.int8)
    inside[first[kept]] += 1
    inside[last[kept] + 1] -= 1  # the mark behind a cell parts it from the next
    cells = data[np.cumsum(inside[:-1], dtype=np.int8).astype(bool)]
    cells[cells == ord("]")] = ord(",")
    values = np.zeros(shape[:2], dtype=np.float32)
    numbers = _numbers(cells.tobytes()[:-1])
    if numbers.size != np.count_nonzero(kept):
        return None
    values[kept] = numbers
    having = {name.decode(): np.flatnonzero(kept[:, place]) for place, name in enumerate(names)}
    return {name: (own, values[own, place]) for place, (name, own) in enumerate(having.items()) if own.size}


def _cells_one_by_one(texts: Sequence[bytes], row: int, rows: int) -> _Cells:
    """Do what `_cells_of_row` does for texts that differ; a cell that is no number is NaN."""
    pattern = re.compile(rb'"([^"\\]+)":\[(?:[^,\]]*,){%d}([^,\]]*)(?:,[^,\]]*){%d}\]' % (row, rows - row - 1))
    cells: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for at, text in enumerate(texts):
        for name, cell in pattern.findall(text):
            if cell != b"null":
                numbers = _numbers(cell)
                cells[name.decode()].append((at, numbers[0] if numbers.size else np.nan))
    return {
        name: (np.array([at for at, _ in each]), np.array([value for _, value in each], dtype=np.float32))
        for name, each in cells.items()
    }
