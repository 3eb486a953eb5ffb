"""Findings as a table."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_bn.rules.finding import Finding

__all__ = ["markdown"]

_ORDER = ("error", "warning", "info")


def markdown(findings: Iterable[Finding]) -> str:
    """Return the findings as a Markdown table, the worst first."""
    rows = ["| level | rule | where | when | what |", "| --- | --- | --- | --- | --- |"]
    for finding in sorted(findings, key=lambda finding: _ORDER.index(finding.level)):
        what = (
            finding.title,
            f"seen: {finding.seen}",
            f"why: {finding.why}",
            f"fix: `{finding.fix}`",
            f"more: {finding.link}",
        )
        cells = (finding.level, finding.code, finding.where, f"{finding.stage}, step {finding.step}", "<br>".join(what))
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows)
