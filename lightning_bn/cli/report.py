"""``lightning-bn report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_bn.cli.output import OK, RefusedError, UsageError
from lightning_bn.dashboard.report import find_journal, report_html, run_name


def report(runs: Sequence[Path], *, output: Path) -> int:
    """Write the page about one run, or about two to compare, as one HTML file."""
    if not 1 <= len(runs) <= 2:
        raise UsageError(f"report takes one run, or two to compare; here are {len(runs)}.")
    try:
        paths = [find_journal(run) for run in runs]
        names = [run_name(path) for path in paths]
        if len(set(names)) < len(names):
            names = [str(path.parent) for path in paths]
        content = report_html(dict(zip(names, paths, strict=True)))
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise RefusedError(str(error)) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(content, encoding="utf-8")
    print(f"{output} ({len(content) / 1e6:.1f} MB): open it in a browser.")
    return OK
