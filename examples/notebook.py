"""Write tutorial.ipynb from tutorial.py, whose cells begin with `# %%`: `python examples/notebook.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent / "tutorial.py"


def notebook(source: str) -> dict[str, Any]:
    """Return the notebook of a program in cells."""
    cells: list[dict[str, Any]] = []
    for number, part in enumerate(re.split(r"(?m)^# %%", source)[1:]):
        head, _, body = part.partition("\n")
        is_text = "[markdown]" in head
        body = re.sub(r"(?m)^# ?", "", body) if is_text else body
        lines = body.strip().splitlines(keepends=True)
        cell: dict[str, Any] = {"cell_type": "markdown" if is_text else "code", "id": f"cell-{number}", "metadata": {}}
        cells.append({**cell, "source": lines, **({} if is_text else {"execution_count": None, "outputs": []})})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def text(source: str) -> str:
    """Return the notebook as its file has it."""
    return json.dumps(notebook(source), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SOURCE.with_suffix(".ipynb").write_text(text(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
