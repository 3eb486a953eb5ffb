"""A run in one sentence, and the gap between training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_bn.dashboard.findings import described_statistics, layers_of
from lightning_bn.grids import Limits
from lightning_bn.journal.reader import JournalReader

MEASURE = 'Trainer(callbacks=[CompareAverages({"window 20": Window(20)}, monitor="val_loss"), ...])'
"""What measures the gap, for the next run."""


def verdict_of(journal: JournalReader, findings: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the verdict as ``level`` (``"error"``, ``"warning"``, ``"past"``, ``"healthy"``, ``"unknown"``) and
    ``text``."""
    now = [each for each in findings if not each["past"]]
    guard = [each for each in now if each["source"] == "guard" and each["level"] != "info"]
    sick, recovered = layers_of(findings)
    parts = []
    if sick:
        first = min(each["first"] for each in now if each["source"] == "monitor")
        parts.append(f"{_count(len(sick), 'layer')} sick since step {first:,}")
    if recovered:
        parts.append(f"{_count(len(recovered), 'layer')} recovered" if not sick else f"{len(recovered)} recovered")
    if guard:
        parts.append(f"{_count(len(guard), 'mistake')} of modes or statistics")
    if parts:
        level = "error" if sick or any(each["level"] == "error" for each in guard) else "warning" if guard else "past"
        return {"level": level, "text": "; ".join(parts), "nearest": None}
    if not any(journal.samples.values()):
        return {"level": "unknown", "text": "No sample has come yet", "nearest": None}
    nearest = nearest_limit(journal)
    return {"level": "healthy", "text": "Healthy: no layer was beyond its limits", "nearest": nearest}


def limits_of(statistic: Mapping[str, Any]) -> Limits:
    """Return the limits of an entry of the journal's ``statistics`` line."""
    low, high, healthy = (statistic.get(name) for name in ("low", "high", "healthy"))
    return Limits(
        low=-np.inf if low is None else float(low),
        high=np.inf if high is None else float(high),
        healthy=None if healthy is None else float(healthy),
        log=bool(statistic.get("log")),
    )


FARTHEST = 10.0
"""The largest share of the way to a limit that is told apart."""


def nearest_limit(journal: JournalReader) -> dict[str, Any] | None:
    """Return the layer that is nearest to a limit at the newest sample, and how much of the limit it has used."""
    best: dict[str, Any] | None = None
    statistics = described_statistics(journal)
    for stage, samples in journal.samples.items():
        for name in samples[-1].statistics if samples else ():
            if (column := samples[-1].column(name)) is None:
                continue
            used = _used(column.values, limits_of(statistics.get(name, {})))
            used[[*samples[-1].warming.get(name, ()), *samples[-1].layout.unjudged.get(name, ())]] = -1
            place = int(used.argmax()) if used.size else 0
            if used.size and used[place] > (best["used"] if best else 0):
                best = {
                    "layer": samples[-1].rows[place],
                    "statistic": name,
                    "label": statistics.get(name, {}).get("label", name),
                    "stage": stage,
                    "value": float(f"{column.values[place]:.4g}"),
                    "used": float(f"{used[place]:.3g}"),
                }
    return best


def _used(values: Any, limits: Limits) -> Any:
    """Return each value's share of the limit that it is nearest to; on a logarithmic scale, of the way there."""
    shares = [np.full(values.shape, -1.0)]
    finite = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    healthy = limits.healthy or 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        for limit in (limits.low, limits.high):
            if limits.log and healthy > 0 and limit > 0 and np.isfinite(limit):
                shares.append(np.log(finite / healthy) / np.log(limit / healthy))
            elif not limits.log and np.isfinite(limit) and limit > healthy:
                shares.append((finite - healthy) / (limit - healthy))
            elif limit == healthy:  # there should be none, and so there is no way to the limit
                shares.append(np.where(finite > limit, 1.0, -1.0))
    used = np.max(np.nan_to_num(shares, nan=-1.0), axis=0)
    return np.minimum(used, FARTHEST)  # a scale of 0 is infinitely far on a logarithm, and JSON has no infinity


def gap_of(journal: JournalReader) -> dict[str, Any]:
    """Return the metric under the layers' own, recalibrated and batch statistics, as far as it was measured."""
    averages, recalibrations = journal.events["averages"], journal.events["recalibration"]
    if averages:
        metrics, monitor = averages[-1].get("metrics", {}), averages[-1].get("monitor")
        rows = {name: metrics.get(name, {}).get(monitor) for name in ("own", "recalibrated", "batch")}
        return _gap(monitor, rows, "CompareAverages")
    for event in reversed(recalibrations):
        if event.get("before") is not None:
            rows = {"own": event["before"], "recalibrated": event.get("after"), "batch": None}
            return _gap(event.get("metric"), rows, "BatchNormRecalibration")
    return _gap(None, {}, "")


def _gap(metric: Any, rows: dict[str, Any], source: str) -> dict[str, Any]:
    known = [value for value in rows.values() if isinstance(value, (int, float))]  # recalibrated, else the batches'
    gap = known[0] - known[1] if len(known) > 1 and rows["own"] is not None else None
    return {"metric": metric, "rows": rows, "gap": gap, "source": source, "how": MEASURE}


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
