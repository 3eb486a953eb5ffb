"""The page's own files, and plotly.js from the package that is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

STATIC = Path(__file__).parent / "static"

INSTALL = "pip install 'lightning-bn[dashboard]'"
"""What to run where plotly is missing."""


def plotly_file() -> Path | None:
    """Return plotly.min.js of the installed package, which is not imported for it; None where there is none."""
    found = find_spec("plotly")
    for folder in (found.submodule_search_locations or []) if found else []:
        file = Path(folder) / "package_data" / "plotly.min.js"
        if file.is_file():
            return file
    return None
