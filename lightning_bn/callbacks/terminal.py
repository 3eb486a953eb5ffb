"""What the callbacks say to the user at a terminal: one block at the end, from all of them that are in the Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning_bn.activations.episodes import not_healthy
from lightning_bn.callbacks.both_lightnings import Trainer
from lightning_bn.callbacks.loggers import keeps_files, log_files
from lightning_bn.callbacks.run_journal import journal_of
from lightning_bn.dashboard.assets import INSTALL, plotly_file
from lightning_bn.dashboard.report import report_html, run_name
from lightning_bn.error_boundary import ErrorBoundary, guarded


@dataclass(frozen=True)
class LastWords:
    """What one callback has to say at the end of a run."""

    place: int
    """In the block: the smallest comes first."""
    lines: Sequence[str]
    is_mistake: bool = False
    """Whether a mistake is among it, beside which no run is called healthy."""
    is_aside: bool = False
    """Whether it is said only where another callback has something to say."""


class ClosingBlock:
    """Collects the callbacks of a Trainer as they are set up, and prints one block when the last of them has ended, be
    it with the run or with an error.

    A callback says its part in ``_last_words(trainer)``, which returns `LastWords` or None.
    """

    def __init__(self) -> None:
        self._boundary = ErrorBoundary("The closing block")
        self._members: list[Any] = []
        self._ended: set[int] = set()

    @guarded
    def join(self, member: Any) -> None:
        """Take a callback in; the first one begins the next block."""
        if self._ended:
            self._members, self._ended = [], set()
        if not any(each is member for each in self._members):
            self._members.append(member)

    @guarded
    def leave(self, member: Any, trainer: Trainer) -> None:
        """Take note that a callback has ended, and print the block after the last."""
        self._ended.add(id(member))
        if self._members and self._ended >= {id(each) for each in self._members}:
            members, self._members = self._members, []
            words = [
                each._boundary.attempt("its last words", each._last_words, trainer)
                for each in members
                if hasattr(each, "_last_words")
            ]
            if trainer.is_global_zero:
                say(_block([each for each in words if each is not None], trainer))
                self._boundary.attempt("the report in the loggers", _log_report, trainer)


def _block(words: Sequence[LastWords], trainer: Trainer) -> list[str]:
    words = sorted((each for each in words if each.lines), key=lambda each: each.place)
    if all(each.is_aside for each in words):
        return []
    lines = [line for each in words for line in each.lines]
    if any(each.is_mistake for each in words):
        lines = not_healthy(lines)
    path = journal_of(trainer).journal.path
    if path is not None and path.exists():
        missing = "" if plotly_file() is not None else f"  ({INSTALL})"
        lines.append(f"The whole run, as a page: lightning-bn report {_short(path.parent)}{missing}")
    return lines


def _log_report(trainer: Trainer) -> None:
    """Give the page and the table of the run to the loggers that keep files: nobody looks for them on a disk there."""
    path = journal_of(trainer).journal.path
    if path is None or not path.exists() or plotly_file() is None or not keeps_files(trainer.loggers):
        return
    with TemporaryDirectory() as folder:
        page = Path(folder) / "batch_norm_report.html"
        page.write_text(report_html({run_name(path): path}), encoding="utf-8")
        table = path.parent / "activation_stats.csv"
        log_files(trainer.loggers, [page, *([table] if table.exists() else [])])


def _short(folder: Path) -> str:
    here = Path.cwd()
    text = str(folder.resolve().relative_to(here) if folder.resolve().is_relative_to(here) else folder)
    return f'"{text}"' if " " in text else text


def say(lines: Sequence[str]) -> None:
    """Print lines as Lightning prints its results: through rich where that is installed, through `print` elsewhere."""
    if not lines:
        return
    if find_spec("rich") is None:
        print("\n".join(lines))
        return
    from rich import get_console
    from rich.text import Text

    styles = {"Healthy": "green", "Sick": "bold red", "Open error": "bold red", "Was sick": "yellow"}
    styles["Open warning"] = "yellow"
    for line in lines:
        get_console().print(Text(line, style=styles.get(line.partition(":")[0], "")), soft_wrap=True)
