"""The mode, statistics and configuration rules: code, what was observed, why it matters, the fix."""

from __future__ import annotations

from lightning_bn.rules.configuration import CONFIGURATION_RULES
from lightning_bn.rules.modes import MODE_RULES
from lightning_bn.rules.rule import Finding, Level, ModeCheckError, Rule
from lightning_bn.rules.statistics import STATISTICS_RULES

__all__ = ["RULES", "Finding", "Level", "ModeCheckError", "Rule"]

RULES: dict[str, Rule] = {rule.code: rule for rule in (*MODE_RULES, *STATISTICS_RULES, *CONFIGURATION_RULES)}
"""Every rule by its code."""
