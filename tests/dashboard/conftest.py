"""Runs, a browser, and the report on runs, for all tests of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from journals import HOSTILE, layer_names, write_run

from lightning_bn.dashboard.report import report_html
from lightning_bn.journal.lines import FILE_NAME

if TYPE_CHECKING:
    from pages import Page

RUNS: dict[str, dict[str, Any]] = {
    "sick": {},
    "healthy": {"sick": None, "events": False},
    "nan": {"sick": "nan", "events": False},
    "large": {"layers": 160, "samples": 300},
    "one": {"layers": 1, "sick": None, "events": False, "samples": 5},
    HOSTILE[0].replace("/", ""): {"layers": [*HOSTILE, *layer_names(9)], "samples": 30},
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, options in RUNS.items():
        write_run(folder / name, **options)
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from browsers import open_browser  # which skips what asks for it where selenium is missing

    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def show(runs: Path, browser: Any, tmp_path: Path) -> Callable[..., Page]:
    """Open the report on runs: ``show("sick")``."""
    from browsers import blank, resize
    from pages import Page

    def opened(*names: str, address: str = "", folder: Path = runs) -> Page:
        file = tmp_path / "report.html"
        file.write_text(report_html({name: folder / name / FILE_NAME for name in names}), encoding="utf-8")
        resize(browser, 1280, 1000)
        blank(browser)
        browser.get(f"file://{file}{address}")
        return Page(browser).ready()

    return opened
