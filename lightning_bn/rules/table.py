"""Findings as a table."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_bn.rules.rule import Finding, listing

__all__ = ["markdown"]

_ORDER = ("error", "warning", "info")


def markdown(findings: Iterable[Finding]) -> str:
    """Return the findings as a Markdown table, the worst first."""
    rows = ["| level | rule | where | when | what |", "| --- | --- | --- | --- | --- |"]
    for finding in sorted(findings, key=lambda finding: _ORDER.index(finding.level)):
        title, _, *body = finding.message.splitlines()
        cells = (
            finding.level,
            finding.code,
            listing(finding.layers),
            f"{finding.stage}, step {finding.step}",
            "<br>".join((title, *(line.strip() for line in body))),
        )
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows)
