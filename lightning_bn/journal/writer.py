"""Writes a journal."""

from __future__ import annotations

import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_bn.journal.lines import FILE_NAME, VERSION, encode, encode_numbers, encode_object

CHANNEL_BUDGET = 6_000_000
"""Bytes that the lines of channels may take in all; a sample is kept each time the run has doubled, so few are
refused."""


class Journal:
    """One run's journal: each call appends one line, which is in the file when the call returns.

    The file is made by the first line, and an earlier run's is continued. A kill can cut the last line short; what is
    written next then begins on a line of its own. Writing never ends a training: a full disk is told once, and nothing
    more is written.

    Args:
        directory: of the run; None for a journal that keeps nothing, as on all ranks but the first.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     journal = Journal(Path(folder))
        ...     journal.write("epoch", step=0, epoch=0)
        ...     print((Path(folder) / "lightning_bn.jsonl").read_text().splitlines()[-1])
        {"kind":"epoch","step":0,"epoch":0}
    """

    def __init__(self, directory: Path | None) -> None:
        self.path = None if directory is None else directory / FILE_NAME
        self._begun = False
        self._told: dict[str, Any] = {}
        self._head: dict[str, Any] = {}
        self._rows = ""
        self._channels = 0
        self._next_channels: dict[str, int] = {}

    def write(self, kind: str, **fields: Any) -> None:
        """Append a line of a kind that `docs/journal.md` tells of."""
        self._append(encode(kind, fields))

    def write_once(self, kind: str, *, by: str = "", **fields: Any) -> None:
        """Append a line unless the last one of its kind that came this way said the same (several callbacks see one
        epoch), or the same under the name `by`: at the start it is as if that had been empty."""
        told = fields[by] if by else fields
        if self.path is not None and self._told.get(kind, []) != told:
            self._told[kind] = told
            self.write(kind, **fields)

    def write_sample(
        self,
        stage: str,
        step: int,
        epoch: int,
        rows: Sequence[str],
        columns: Sequence[str],
        values: NDArray[np.float64],
        has_value: NDArray[np.bool_],
        *,
        rates: Mapping[str, float] | None = None,
        warming: Mapping[str, Sequence[int]] | None = None,
        unjudged: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Append the statistics of all layers at one step.

        Args:
            stage: "train", "val" or "test".
            step: of the optimizer.
            epoch: the Trainer's.
            rows: R layers, in forward order.
            columns: C statistics.
            values: (R, C).
            has_value: (R, C), False where a statistic does not apply.
            rates: learning rates by name.
            warming: by statistic, the places in `rows` whose values say nothing yet.
            unjudged: by statistic, the places in `rows` for which its limits do not hold.
        """
        if self.path is None or not rows:
            return
        head = {"rows": list(rows), "unjudged": dict(unjudged or {})}
        if head != self._head:
            self._head = head
            self._rows = f"{zlib.crc32(encode('rows', head).encode()):08x}"
            self.write("rows", id=self._rows, **head)
        fields = {"stage": stage, "step": step, "epoch": epoch, "rows": self._rows, "rates": rates or {}}
        fields["warming"] = {name: list(places) for name, places in (warming or {}).items() if places}
        places = np.flatnonzero(has_value.any(axis=0)).tolist()
        columns_of = zip(places, values.T[places].tolist(), has_value.T[places].tolist(), strict=True)
        text = encode_object((columns[place], encode_numbers(cells, has)) for place, cells, has in columns_of)
        self._append(encode("sample", fields, values=text))

    def wants_channels(self, stage: str, samples: int) -> bool:
        """Return whether the channels of this sample, the `samples`-th of its stage, are to be kept: each time the run
        has grown by a half, within `CHANNEL_BUDGET`."""
        return (
            self.path is not None and self._channels < CHANNEL_BUDGET and samples >= self._next_channels.get(stage, 1)
        )

    def write_channels(
        self, stage: str, step: int, samples: int, layers: Mapping[str, Mapping[str, Sequence[float]]]
    ) -> None:
        """Append vectors over the channels: by layer, by name (``mean``, ``std``, ``dead``)."""
        vectors = (
            (layer, encode_object((name, encode_numbers(values)) for name, values in of_layer.items()))
            for layer, of_layer in layers.items()
        )
        line = encode("channels", {"stage": stage, "step": step}, layers=encode_object(vectors))
        self._next_channels[stage] = samples + max(1, samples // 2)
        self._channels += len(line)
        if self._channels > CHANNEL_BUDGET:
            line = encode("note", {"step": step, "text": "Channels are no longer kept: their lines have reached 6 MB."})
        self._append(line)

    def forget(self) -> None:
        """Begin as in a new file: nothing was told, and no channels were kept."""
        self._told, self._head, self._next_channels = {}, {}, {}

    def _append(self, line: str) -> None:
        if self.path is None:
            return
        try:
            # Opened for each line: an open file would have to be closed on every way out of a training.
            with self.path.open("ab", buffering=0) if self._begun else self._begin(self.path) as file:
                file.write(f"{line}\n".encode())
        except OSError as error:
            warnings.warn(f"The journal {self.path} can't be written and ends here: {error}", stacklevel=3)
            self.path = None

    def _begin(self, path: Path) -> FileIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
        self._begun = True
        size = file.seek(0, 2)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")  # a kill left half a line
        else:
            file.write(f"{encode('journal', {'version': VERSION, 'time': round(time.time(), 3)})}\n".encode())
        return file
