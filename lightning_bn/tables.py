"""Tables, as a terminal, a logger and a notebook show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Return the lines of a table: the first `left` columns to the left, the others, which are numbers, to the right.

    Example:
        >>> print("\\n".join(text_table(["layer", "mean"], [["bn1", "0.5"]])))
        layer  mean
        bn1     0.5
    """
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Return the lines of a Markdown table: the first `left` columns to the left, the others to the right.

    Example:
        >>> markdown_table(["layer", "mean"], [["a|b", "0.5"]])
        ['| layer | mean |', '|---|---:|', '| a\\\\|b | 0.5 |']
    """
    rule = "|" + "---|" * left + "---:|" * (len(header) - left)
    first, *others = ("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in (header, *rows))
    return [first, rule, *others]


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
