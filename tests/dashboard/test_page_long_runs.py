"""The page on long runs: as many columns as the screen has points for, none of which hides an illness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from browsers import NEEDS_BROWSER, resize
from journals import write_run
from pages import Page, table

pytestmark = [NEEDS_BROWSER, pytest.mark.timeout(300)]


def test_a_short_illness_is_not_lost(show: Callable[..., Page], tmp_path: Path) -> None:
    """Of 10,000 samples one is sick: it is drawn and marked, however few points the map is wide, and is said to be."""
    write_run(tmp_path / "long", layers=["a.bn1", "a.relu#1"], samples=10_000, every=1, sick="blip", events=False)
    values = np.array(table(tmp_path / "long", "dead_fraction")[1][1])
    assert (values > 0.25).sum() == 1
    page = show("long", folder=tmp_path, address="#statistic=dead_fraction")
    for width in (1280, 390):
        resize(page.driver, width, 1000)
        page.until(
            lambda width=width: (
                page.columns() <= page.js("return document.querySelector('.area').clientWidth") <= width - 100
            ),
            "a column a point",
        )
        row = page.rows().index("a.relu#1")
        drawn = page.drawn(0, 1)[row]
        place = int(np.argmax(drawn))
        assert drawn[place] == pytest.approx(1, abs=0.01)
        assert (np.delete(drawn, place) < 0.1).all()
        assert any(point[3] for point in page.mark(row, place))
        assert "10,000 samples in " in page.text(".legend")
    page.point(row, place)
    page.until(lambda: page.text(".tip"), "the words")
    assert "worst of steps" in page.text(".tip")
    assert "above the limit of 0.25" in page.text(".tip")


def test_a_thousand_layers(show: Callable[..., Page], tmp_path: Path) -> None:
    """They are folded until they are asked for; then each has a row, whose cells are the table's."""
    write_run(tmp_path / "wide", layers=1000, samples=4, events=False)
    page = show("wide", folder=tmp_path)
    assert "3 layers sick" in page.text(".verdict")
    assert len(page.rows()) < 60
    page = show("wide", folder=tmp_path, address="#sort=worst")
    names, values = table(tmp_path / "wide", "dead_fraction")
    rows, drawn = page.rows(), page.drawn(0, 1)
    assert len(rows) == 1000
    np.testing.assert_allclose(drawn, [values[names.index(row)] for row in rows], atol=0.01)
    assert page.complaints() == []
