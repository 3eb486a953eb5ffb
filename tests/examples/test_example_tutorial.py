"""examples/tutorial.ipynb: in step with its source, a well-formed notebook, and its cells find, mend and repair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fitting import quiet
from notebook import SOURCE, text

NOTEBOOK = SOURCE.with_suffix(".ipynb")


def test_it_is_in_step_with_its_source() -> None:
    """`python examples/notebook.py` would write what is there."""
    assert NOTEBOOK.read_text(encoding="utf-8") == text(SOURCE.read_text(encoding="utf-8"))


def test_its_cells_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, in one namespace, as a notebook runs them; the mistake costs accuracy, and both repairs give
    it back."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert [cell["cell_type"] for cell in cells[:2]] == ["markdown", "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    with quiet():
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["finding"].layers == ("features",)
    assert names["mended"] > names["accuracy"] + 0.2
    assert [each for each in names["guard"].findings if each.level != "info"] == []
    assert names["repaired"] > names["slow"] + 0.2
