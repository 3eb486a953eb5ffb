"""At which steps training is looked at."""

from __future__ import annotations

__all__ = ["interval_at"]

# Samples at each interval before it doubles: enough columns of a heat map for a run of any length.
SAMPLES = 16


def interval_at(step: int, longest: int) -> int:
    """Return the interval at which a growing run is looked at: 1 at first, and twice as long after every 16 samples,
    until it is `longest`.

    Example:
        >>> steps = [step for step in range(176) if step % interval_at(step, 50) == 0]
        >>> len(steps), steps[14:20], steps[-2:]
        (56, [14, 15, 16, 18, 20, 22], [160, 168])
    """
    interval, until = 1, SAMPLES
    while step >= until and interval < longest:
        interval *= 2
        until += SAMPLES * interval
    return min(interval, longest)
