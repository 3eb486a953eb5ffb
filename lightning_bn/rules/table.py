"""Findings as a table."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_bn.rules.finding import Finding
from lightning_bn.tables import markdown_table

__all__ = ["markdown"]

_ORDER = ("error", "warning", "info")


def markdown(findings: Iterable[Finding]) -> str:
    """Return the findings as a Markdown table, the worst first."""
    rows = []
    for finding in sorted(findings, key=lambda finding: _ORDER.index(finding.level)):
        what = (
            finding.title,
            f"seen: {finding.seen}",
            f"why: {finding.why}",
            f"fix: `{finding.fix}`",
            f"more: {finding.link}",
        )
        when = f"{finding.stage}, step {finding.step}"
        rows.append((finding.level, finding.code, finding.where, when, "<br>".join(what)))
    return "\n".join(markdown_table(("level", "rule", "where", "when", "what"), rows, left=5))
