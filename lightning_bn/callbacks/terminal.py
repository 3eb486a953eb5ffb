"""What a callback says to the user at a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec


def say(lines: Sequence[str]) -> None:
    """Print lines as Lightning prints its results: through rich where that is installed, through `print` elsewhere."""
    if find_spec("rich") is None:
        print("\n".join(lines))
        return
    from rich import get_console
    from rich.text import Text

    styles = {"Healthy": "green", "Sick": "bold red", "Was sick": "yellow"}
    for line in lines:
        get_console().print(Text(line, style=styles.get(line.partition(":")[0], "")), soft_wrap=True)
