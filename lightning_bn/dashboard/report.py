"""The page and a run's journal as one HTML file, which needs no network."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_bn.dashboard.assets import INSTALL, STATIC, plotly_file
from lightning_bn.dashboard.view import MAX_COLUMNS, grid_of, overview_of, summary_of, vectors_of
from lightning_bn.journal.lines import FILE_NAME
from lightning_bn.journal.reader import JournalReader

BUDGET = 12_000_000
"""Bytes for the numbers of all runs; plotly.js is 4.8 million, and a file of 20 can still be sent."""
_CELL = 4  # bytes a number takes, compressed and in base64

# Nothing may be fetched; what is inline is ours.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


def find_journal(run: Path) -> Path:
    """Return the journal of a run, given its directory, the file itself, or a directory with one run below.

    Raises:
        FileNotFoundError: there is none, or there are several.
    """
    if run.is_file():
        return run
    if (run / FILE_NAME).is_file():
        return run / FILE_NAME
    found = sorted(run.rglob(FILE_NAME)) if run.is_dir() else []
    if len(found) == 1:
        return found[0]
    if not found:
        raise FileNotFoundError(
            f"{run}: there is no {FILE_NAME} in it or below it. ActivationStatsMonitor and ModeCheck write one next to "
            "the logger's files."
        )
    listed = ", ".join(str(each.parent) for each in found[-5:])
    raise FileNotFoundError(f"{run}: {len(found)} runs lie below it. Name one or two of them: {listed}.")


def run_name(journal: Path) -> str:
    """Return what a run is called: the last two folders of its path."""
    return "/".join(journal.resolve().parent.parts[-2:])


def report_html(journals: Mapping[str, Path]) -> str:
    """Return the file.

    Args:
        journals: by the name of the run, its journal; the second is the one to compare with.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    plotly = plotly_file()
    if plotly is None:
        raise ModuleNotFoundError(f"The report is drawn by plotly.js, which comes with the package plotly: {INSTALL}.")
    readers = {name: JournalReader.of_file(path) for name, path in journals.items()}
    parts = _parts(readers, journals)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(' and '.join(journals))}: batch norm</title>",
            f"<style>{(STATIC / 'page.css').read_text()}</style>",
            f'<script type="importmap">{json.dumps({"imports": _imports()})}</script>',
            '</head><body><div id="page"></div>',
            f'<script type="text/plain" id="plotly">{_inline(plotly.read_text(encoding="utf-8"))}</script>',
            *(_part(name, value) for name, value in parts.items()),
            '<script type="module">import "lightning_bn/report.js";</script>',
            "</body></html>",
        ]
    )


def _parts(readers: Mapping[str, JournalReader], journals: Mapping[str, Path]) -> dict[str, bytes]:
    """Return all that the page may ask for, compressed; with fewer columns where that is too much."""
    names = list(readers)
    few: dict[str, Any] = {
        "runs": {"runs": names, "searched": [], "file": FILE_NAME},
        "summaries": [summary_of(reader, name, journals[name].stat().st_mtime) for name, reader in readers.items()],
    }
    for name, reader in readers.items():
        path = journals[name]
        overview = overview_of(reader, name, str(path.parent), path.stat().st_mtime)
        few[f"run/{name}"] = {"revision": "file", **overview}
        few[f"channels/{name}"] = _channels(reader)
    small = {name: _compress(value) for name, value in few.items()}
    left = BUDGET - sum(map(len, small.values()))
    columns = max(20, min(MAX_COLUMNS, left // (_CELL * max(1, _cells(readers)))))
    while True:
        large = {name: _compress(grid) for name, grid in _grids(readers, columns)}
        if sum(map(len, large.values())) <= max(left, BUDGET // 2) or columns <= 20:
            return {**small, **large}
        columns = columns * 2 // 3


def _grids(readers: Mapping[str, JournalReader], columns: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, reader in readers.items():
        for stage, samples in reader.samples.items():
            for statistic in dict.fromkeys(n for sample in samples[-1:] for n in sample.statistics):
                yield f"grid/{stage}/{statistic}/{name}", grid_of(reader, statistic, stage, columns=columns)


def _cells(readers: Mapping[str, JournalReader]) -> int:
    """Return how many numbers one column of all grids has."""
    newest = [samples[-1] for reader in readers.values() for samples in reader.samples.values() if samples]
    return sum(len(sample.rows) * len(sample.statistics) for sample in newest)


def _channels(reader: JournalReader) -> dict[str, Any]:
    """Return the newest vectors over the channels, and histograms from the whole run."""
    found = vectors_of(reader)
    every = max(1, len(found["histograms"]) // 60)
    return {**found, "channels": found["channels"][-12:], "histograms": found["histograms"][::every]}


def _imports() -> dict[str, str]:
    """Return the modules as data addresses, by the names that they import each other by in the file."""
    found = {}
    for path in sorted(STATIC.glob("*.js")):
        code = re.sub(r'(\bfrom |\bimport )"\./', r'\1"lightning_bn/', path.read_text(encoding="utf-8"))
        found[f"lightning_bn/{path.name}"] = f"data:text/javascript;base64,{base64.b64encode(code.encode()).decode()}"
    return found


def _compress(value: Any) -> bytes:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0))


def _part(name: str, value: bytes) -> str:
    return f'<script type="text/plain" data-part="{html.escape(name)}">{value.decode()}</script>'


def _inline(code: str) -> str:
    """Return code that can't end its script element."""
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")
