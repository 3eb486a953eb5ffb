"""Statistics, samples and episodes as plain numbers, strings, lists and dicts, for who shows them without this
package."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lightning_bn.activations.episodes import Episode, causes, urgency
from lightning_bn.activations.pool_to_host import Mask
from lightning_bn.activations.registry import COLUMNS, STATISTICS
from lightning_bn.activations.sample import SHOWN, WARM_UP, Sample


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


def describe_episodes(episodes: Sequence[Episode]) -> Iterator[dict[str, Any]]:
    """Yield each episode with what to do, and with the layer, statistic and first step of the one it follows from."""
    for cause in causes(episodes):
        for each in (cause.episode, *cause.followers):
            yield {
                "layer": each.layer,
                "statistic": each.statistic,
                "stage": each.stage,
                "first": each.first,
                "last": each.last,
                "peak": each.peak,
                "limit": each.limit,
                "recovered": each.recovered,
                "fix": _fix(each),
                "rule": STATISTICS[each.statistic].rule,
                "cause": None
                if each is cause.episode
                else [cause.episode.layer, cause.episode.statistic, cause.episode.first],
                "urgency": [int(part) for part in urgency(each)],
                "step": each.first,
            }


def _fix(episode: Episode) -> dict[str, str]:
    statistic = STATISTICS[episode.statistic]
    code = statistic.code_low if episode.peak < statistic.low else statistic.code
    if not code:
        return {"code": episode.advice, "place": "advice", "note": ""}
    return {"code": code, "place": "", "note": episode.advice}


def warming(sample: Sample) -> dict[str, list[int]]:
    """Return, by statistic, the rows whose value a known start explains."""
    return _rows(sample.states == WARM_UP)


def unjudged(sample: Sample) -> dict[str, list[int]]:
    """Return, by statistic, the rows for which its limits do not hold."""
    return _rows(sample.states == SHOWN)


def _rows(flags: Mask) -> dict[str, list[int]]:
    return {COLUMNS[place]: np.flatnonzero(flags[:, place]).tolist() for place in np.flatnonzero(flags.any(axis=0))}


def _limit(value: float) -> float | None:
    return value if math.isfinite(value) else None
