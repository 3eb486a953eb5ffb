"""Reads a journal, also one that is still being written or that was cut short."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_bn.journal.lines import VERSION, decode
from lightning_bn.journal.sample import Rows, Sample

__all__ = ["JournalReader"]

_SAMPLE = b'{"kind":"sample",'

# Of these the last line says all.
_WHOLE = ("journal", "statistics", "layers")


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

    samples: dict[str, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    """By stage."""
    events: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    """By kind, every other line, in the order of the file."""
    skipped: int = 0
    """Lines that could not be read."""
    _rest: bytes = b""
    _rows: dict[str, Rows] = field(default_factory=dict)

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
                self._append(*Sample.of_line(line, self._rows))
            else:
                self._sort_in(decode(line))
        except (KeyError, TypeError, ValueError, OverflowError):
            self.skipped += 1

    def _sort_in(self, fields: dict[str, Any]) -> None:
        kind = fields["kind"]
        if kind == "rows":
            unjudged = {name: frozenset(map(int, places)) for name, places in (fields.get("unjudged") or {}).items()}
            self._rows[fields["id"]] = Rows(tuple(map(str, fields["rows"])), unjudged)
            return
        if kind == "start":
            self._forget_after(fields["step"], everything=not fields.get("resumed"))
        if kind in _WHOLE:
            self.events[kind].clear()
        self.events[kind].append(fields)

    def _append(self, stage: str, sample: Sample) -> None:
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

    def version_is_known(self) -> bool:
        """Return whether this reader knows the format in which the file was written."""
        return int(self.whole("journal").get("version", VERSION)) <= VERSION
