"""The registry of statistics as plain dicts, for who shows them without this package."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from lightning_bn.activations.registry import STATISTICS

__all__ = ["describe_statistics"]


def describe_statistics() -> list[dict[str, Any]]:
    """Return an entry for each statistic that is summed up over layers: name, label, limits (None where there is none),
    and how its values become colours."""
    return [
        {
            "name": each.name,
            "label": each.label,
            "low": _limit(each.low) if each.low > 0 else None,
            "high": _limit(each.high),
            "healthy": each.healthy,
            "log": each.log,
            "scale": asdict(each.scale),
        }
        for each in STATISTICS.values()
    ]


def _limit(value: float) -> float | None:
    return value if math.isfinite(value) else None
