"""The mode, statistics and configuration rules: code, what was observed, why it matters, the fix."""

from __future__ import annotations

from lightning_bn.rules import adjacency, boundaries, configuration, evaluations, modes, order, statistics
from lightning_bn.rules.finding import Finding, Fix, Level, ModeCheckError
from lightning_bn.rules.rule import Rule

__all__ = ["RULES", "Finding", "Fix", "Level", "ModeCheckError", "Rule"]

_FILES = (adjacency, boundaries, configuration, evaluations, modes, order, statistics)
_NAMED = [each for file in _FILES for each in vars(file).values() if isinstance(each, type)]
_CLASSES = {each for each in _NAMED if issubclass(each, Rule) and each is not Rule}

RULES: dict[str, Rule] = {rule.code: rule() for rule in sorted(_CLASSES, key=lambda rule: rule.code)}
"""Every rule of these files by its code."""
