"""Tables, as a terminal, a logger and a notebook show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["html_table"]


def html_table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in HTML with `caption` above it; the first column is text, the others are numbers or short words.

    Example:
        >>> print(html_table("a < b", ["layer", "mean"], [["bn1", "0.5"]]))
        <p>a &lt; b</p>
        <table><thead><tr><th>layer</th><th>mean</th></tr></thead>
        <tbody><tr><td style="text-align: left">bn1</td><td>0.5</td></tr></tbody></table>
    """
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    return f"<p>{escape(caption)}</p>\n<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def _cells(row: Sequence[str]) -> str:
    first, *others = row
    return f'<td style="text-align: left">{escape(first)}</td>' + "".join(f"<td>{escape(cell)}</td>" for cell in others)
