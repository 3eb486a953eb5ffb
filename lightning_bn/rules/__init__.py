"""The mode, statistics and configuration rules: code, what was observed, why it matters, the fix."""

from __future__ import annotations

from lightning_bn.rules.adjacency import BiasBeforeBatchNorm, DropoutBeforeBatchNorm
from lightning_bn.rules.boundaries import MovedBetweenBatches
from lightning_bn.rules.configuration import CONFIGURATION_RULES
from lightning_bn.rules.evaluations import EVALUATION_RULES, MISMATCH_RULES
from lightning_bn.rules.finding import Finding, Fix, Level, ModeCheckError
from lightning_bn.rules.modes import MODE_RULES
from lightning_bn.rules.order import SortedBatches
from lightning_bn.rules.rule import Rule
from lightning_bn.rules.statistics import STATISTICS_RULES

__all__ = ["RULES", "Finding", "Fix", "Level", "ModeCheckError", "Rule"]

_RULES: tuple[Rule, ...] = (
    *MODE_RULES,
    *STATISTICS_RULES,
    *MISMATCH_RULES,
    *EVALUATION_RULES,
    *CONFIGURATION_RULES,
    MovedBetweenBatches(),
    BiasBeforeBatchNorm(),
    DropoutBeforeBatchNorm(),
    SortedBatches(),
)

RULES: dict[str, Rule] = {rule.code: rule for rule in sorted(_RULES, key=lambda rule: rule.code)}
"""Every rule by its code."""
