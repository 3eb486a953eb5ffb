"""What the page asks for, made of a journal: plain dicts and lists, as JSON has them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_bn.dashboard.findings import described_statistics, findings_of, layer_names, layers_of
from lightning_bn.dashboard.verdict import gap_of, limits_of, nearest_limit, verdict_of
from lightning_bn.grids import Grid, Limits
from lightning_bn.journal.reader import JournalReader, grid_of_layers, grids_of_layer

MAX_COLUMNS = 800
"""As many as a wide screen has points for; a zoom asks for more."""

_STAGES = ("train", "val", "test")
_OF_MODULE = re.compile(r"[@#\[]")  # what follows the name of a module in that of a row


def overview_of(journal: JournalReader, name: str, directory: str, changed: float) -> dict[str, Any]:
    """Return all of a run but its numbers.

    Args:
        journal: of the run.
        name: of the run, as the page shows it.
        directory: in which the journal lies.
        changed: when the file was written last, in seconds since 1970.
    """
    findings, ends = findings_of(journal), journal.events["end"]
    return {
        "name": name,
        "directory": directory,
        "skipped": journal.skipped,
        "changed": changed,
        "status": ends[-1].get("status", "finished") if ends else None,
        "step": journal.last_step(),
        "samples": {stage: len(samples) for stage, samples in journal.samples.items() if samples},
        "layers": _layers(journal),
        "statistics": _statistics(journal, findings),
        "findings": findings,
        "verdict": verdict_of(journal, findings),
        "gap": gap_of(journal),
        "lanes": _lanes(journal),
        "recalibrations": journal.events["recalibration"],
        "averages": _averages(journal),
        "rules": {each["code"]: each.get("text", "") for each in journal.events["rule"] if "code" in each},
        "unseen": _unseen(journal),
        "notes": _notes(journal),
    }


def summary_of(journal: JournalReader, name: str, changed: float) -> dict[str, Any]:
    """Return a row of the table of runs: how bad it was, how many layers were sick, since when, and the gap."""
    findings = findings_of(journal)
    sick, recovered = layers_of(findings)
    verdict = verdict_of(journal, findings)
    return {
        "name": name,
        "changed": changed,
        "level": verdict["level"],
        "verdict": verdict["text"],
        "step": journal.last_step(),
        "sick": len(sick),
        "recovered": len(recovered),
        "guard": sum(each["source"] == "guard" and each["level"] != "info" for each in findings),
        "first": min((each["first"] for each in findings if each["source"] == "monitor"), default=None),
        "nearest": nearest_limit(journal),
        "gap": gap_of(journal)["gap"],
    }


def grid_of(
    journal: JournalReader,
    statistic: str,
    stage: str,
    *,
    columns: int = MAX_COLUMNS,
    first: int | None = None,
    last: int | None = None,
) -> dict[str, Any]:
    """Return a heat map: layers, the steps of each column, and values; None is missing, "nan" is NaN."""
    grid = grid_of_layers(journal.samples.get(stage, []), statistic)
    if first is not None or last is not None:
        grid = grid.within(first if first is not None else 0, last if last is not None else 2**62)
    thin = grid.thinned(columns, _limits(journal).get(statistic, Limits()))
    rates = {sample.step: next(iter(sample.rates.values()), None) for sample in journal.samples.get(stage, [])}
    more = {"unjudged": _unjudged(journal, stage, statistic, thin.layers), "rates": [rates.get(s) for s in thin.first]}
    return {"statistic": statistic, "stage": stage, **_plain_grid(thin), **more}


def layer_of(journal: JournalReader, layer: str, *, columns: int = MAX_COLUMNS) -> dict[str, Any]:
    """Return every statistic of one layer over the run, by stage."""
    limits = _limits(journal)
    found: dict[str, dict[str, Any]] = {}
    for stage, samples in journal.samples.items():
        for statistic, grid in grids_of_layer(samples, layer).items():
            plain = _plain_grid(grid.thinned(columns, limits.get(statistic, Limits())))
            of_layer = {"steps": plain["first"], "values": plain["values"][0], "warming": plain["warming"][0]}
            found.setdefault(statistic, {})[stage] = of_layer
    return found


def channels_of(journal: JournalReader, layer: str) -> dict[str, Any]:
    """Return the vectors over the channels of one layer and its histograms, by stage and step."""
    vectors = vectors_of(journal)
    for kind in ("channels", "histograms"):
        vectors[kind] = [{**each, **each["layers"][layer]} for each in vectors[kind] if layer in each["layers"]]
    return vectors


def vectors_of(journal: JournalReader) -> dict[str, Any]:
    """Return the same of all layers, by name below ``layers``."""
    found: dict[str, Any] = {"edges": journal.whole("statistics").get("histogram_edges", [])}
    for kind in ("channels", "histograms"):
        found[kind] = [
            {
                "stage": event.get("stage", "train"),
                "step": event["step"],
                "layers": {n: v if isinstance(v, dict) else {"counts": v} for n, v in event["layers"].items()},
            }
            for event in journal.events[kind]
        ]
    return found


def _layers(journal: JournalReader) -> list[dict[str, Any]]:
    """Return the layers in forward order, with what is known of each; those of the samples that no line describes
    too."""
    described = {each["name"]: each for each in journal.whole("layers").get("layers", [])}
    # A set of statistics, `bn@night`, a place where a module is called again, `relu#2`, and a width, `relu[64]`, are of
    # the same module.
    return [
        {**described.get(name, described.get(_OF_MODULE.split(name)[0], {})), "name": name}
        for name in layer_names(journal)
    ]


def _statistics(journal: JournalReader, findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    known = described_statistics(journal)
    stages: dict[str, list[str]] = {}
    for stage in _STAGES:
        samples = journal.samples.get(stage, [])
        for name in samples[-1].statistics if samples else ():
            stages.setdefault(name, []).append(stage)
    found = []
    for name, of in stages.items():
        sick, recovered = map(len, layers_of([each for each in findings if each["statistic"] == name]))
        entry = {"label": name, **known.get(name, {}), "name": name, "stages": of, "sick": sick, "past": recovered}
        found.append(entry)
    return found


def _lanes(journal: JournalReader) -> dict[str, Any]:
    rates = [(sample.step, sample.rates) for sample in journal.samples.get("train", []) if sample.rates]
    changes = [pair for place, pair in enumerate(rates) if place == 0 or pair[1] != rates[place - 1][1]]
    return {
        "epochs": [[each["step"], each.get("epoch")] for each in journal.events["epoch"]],
        "validations": [each["step"] for each in journal.events["validation"]],
        "rates": changes[:: max(1, len(changes) // 500)],
        "eval": _eval_spans(journal),
        "recalibrations": [[each["step"], bool(each.get("kept", True))] for each in journal.events["recalibration"]],
    }


def _eval_spans(journal: JournalReader) -> list[dict[str, Any]]:
    """Return from which step to which each layer was in eval mode while training ran."""
    spans: list[dict[str, Any]] = []
    open_since: dict[str, int] = {}
    for event in journal.events["modes"]:
        now = set(event.get("eval", []))
        for layer in [each for each in open_since if each not in now]:
            spans.append({"layer": layer, "first": open_since.pop(layer), "last": event["step"]})
        for layer in now - set(open_since):
            open_since[layer] = event["step"]
    end = journal.last_step()
    return spans + [{"layer": layer, "first": first, "last": end} for layer, first in open_since.items()]


def _averages(journal: JournalReader) -> dict[str, Any] | None:
    events = journal.events["averages"]
    if not events:
        return None
    monitor = str(events[-1].get("monitor"))
    names = dict.fromkeys(name for event in events for name in event.get("metrics", {}))
    return {
        "monitor": monitor,
        "mode": events[-1].get("mode", "min"),
        "steps": [event["step"] for event in events],
        "values": {n: [event.get("metrics", {}).get(n, {}).get(monitor) for event in events] for n in names},
        "recommended": events[-1].get("recommended"),
        "advice": events[-1].get("advice"),
    }


def _unseen(journal: JournalReader) -> list[dict[str, str]]:
    """Return the layers that could not be looked at: each once, with the stage and the reason."""
    found = {
        (name, event.get("stage", "train")): str(reason)
        for event in journal.events["unseen"]
        for name, reason in (event.get("layers") or {}).items()
    }
    return [{"layer": name, "stage": stage, "reason": reason} for (name, stage), reason in found.items()]


def _notes(journal: JournalReader) -> list[str]:
    notes = list(dict.fromkeys(str(event.get("text")) for event in journal.events["note"]))
    if journal.skipped:
        notes.append(f"{journal.skipped} lines of the journal could not be read and were passed over.")
    if not journal.version_is_known():
        notes.append("A newer version of lightning-bn wrote this journal; upgrade to see all of it.")
    return notes


def _limits(journal: JournalReader) -> dict[str, Limits]:
    return {name: limits_of(each) for name, each in described_statistics(journal).items()}


def _unjudged(journal: JournalReader, stage: str, statistic: str, layers: tuple[str, ...]) -> list[int]:
    """Return the places of the layers for which the limits of a statistic do not hold."""
    newest = journal.samples.get(stage, [])[-1:]
    names = {each.rows[place] for each in newest for place in each.layout.unjudged.get(statistic, ())}
    return [place for place, layer in enumerate(layers) if layer in names]


def _plain_grid(grid: Grid) -> dict[str, Any]:
    rounded = _rounded(grid.values.astype(np.float64))
    return {
        "layers": list(grid.layers),
        "first": grid.first.tolist(),
        "last": grid.last.tolist(),
        "values": [_plain_row(values, nans) for values, nans in zip(rounded, grid.nans, strict=True)],
        "warming": [_spans(row) for row in grid.warming],
        "samples": grid.samples,
    }


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the values with four significant digits, as the nearest numbers that are written so."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        digits = 3 - np.floor(np.log10(np.abs(values)))
        # A power of ten that is no fraction is exact, and so is what is divided by it.
        scale = 10.0 ** np.abs(digits)
        rounded = np.where(digits >= 0, np.round(values * scale) / scale, np.round(values / scale) * scale)
    return np.where(np.isfinite(values) & (values != 0) & np.isfinite(rounded), rounded, values)


def _plain_row(values: NDArray[np.float64], nans: NDArray[np.bool_]) -> list[float | str | None]:
    row: list[float | str | None] = values.tolist()
    for place in np.flatnonzero(~np.isfinite(values)):
        value = float(values[place])
        row[place] = str(value) if np.isinf(value) else "nan" if nans[place] else None
    return row


def _spans(flags: NDArray[np.bool_]) -> list[list[int]]:
    """Return the runs of True as [first, last] places."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return [[int(start), int(stop) - 1] for start, stop in edges.reshape(-1, 2)]
