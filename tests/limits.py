"""Time limits, which a slow machine may multiply: ``LIGHTNING_BN_TEST_TIME=4 make unit``."""

from __future__ import annotations

import os

SCALE = float(os.environ.get("LIGHTNING_BN_TEST_TIME", "1"))


def limit(seconds: float) -> float:
    """Return how many seconds a test may wait where it would wait `seconds` on a machine of usual speed."""
    return seconds * SCALE
