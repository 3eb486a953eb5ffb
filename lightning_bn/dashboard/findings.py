"""Episodes of illness and findings of ModeCheck as one list: by level, and the earliest and most upstream first."""

from __future__ import annotations

from typing import Any

from lightning_bn.journal.reader import JournalReader

_LEVELS = {"error": 0, "warning": 1, "info": 2}


def findings_of(journal: JournalReader) -> list[dict[str, Any]]:
    """Return what was found: each with ``source``, ``level``, ``title``, ``layers``, ``first``, ``last``, ``past``,
    ``text``, ``why``, ``fix``, ``link``, and ``follows``, the place in the list of the one that it follows from."""
    places = {name: place for place, name in enumerate(layer_names(journal))}
    found = [*_episodes(journal), *_guard(journal)]

    def urgency(each: dict[str, Any]) -> list[int]:
        place = min((places.get(name, 1 << 30) for name in each["layers"]), default=1 << 30)
        return each.pop("urgency") or [each["first"], 0, 0, 1, place]

    found.sort(key=urgency)  # as the monitor sorts them: what comes first is the cause
    _group(found)
    return _by_level(found)


def layer_names(journal: JournalReader) -> list[str]:
    """Return the layers in forward order; those that no sample has come last."""
    rows = [samples[-1].rows for samples in journal.samples.values() if samples]
    described = [each["name"] for each in journal.whole("layers").get("layers", [])]
    return list(dict.fromkeys([*(name for names in rows for name in names), *described]))


def described_statistics(journal: JournalReader) -> dict[str, dict[str, Any]]:
    """Return, by name, what the journal says of each statistic."""
    return {each["name"]: each for each in journal.whole("statistics").get("statistics", [])}


def layers_of(findings: list[dict[str, Any]]) -> tuple[set[str], set[str]]:
    """Return the layers that are sick, and those that were and have recovered."""
    episodes = [each for each in findings if each["source"] == "monitor"]
    sick = {layer for each in episodes if not each["past"] for layer in each["layers"]}
    return sick, {layer for each in episodes for layer in each["layers"]} - sick


def _episodes(journal: JournalReader) -> list[dict[str, Any]]:
    known = described_statistics(journal)
    newest = {
        (event.get("stage", "train"), event["layer"], event["statistic"], event["first"]): event
        for event in journal.events["episode"]
        if {"layer", "statistic", "first"} <= set(event)
    }
    end = journal.last_step()
    return [_episode(event, known.get(event["statistic"], {}), end) for event in newest.values()]


def _episode(event: dict[str, Any], statistic: dict[str, Any], end: int) -> dict[str, Any]:
    past = bool(event.get("recovered"))
    return {
        **{name: event.get(name) or statistic.get(name, "") for name in ("why", "fix", "link")},
        "source": "monitor",
        "code": event["statistic"],
        "statistic": event["statistic"],
        "stage": event.get("stage", "train"),
        "level": event.get("level", "warning"),
        "title": event.get("title") or statistic.get("label", event["statistic"]),
        "layers": [event["layer"]],
        "first": int(event["first"]),
        "last": int(event.get("last", event["first"])) if past else end,
        "past": past,
        "text": _against_limit(event, statistic),
        "cause": event.get("cause"),
        "urgency": event.get("urgency"),  # which older journals lack
        "rule": event.get("rule", ""),
    }


def _against_limit(event: dict[str, Any], statistic: dict[str, Any]) -> str:
    """Return the peak against the limit it went beyond, in plain words."""
    peak, low, high = event.get("peak"), statistic.get("low"), statistic.get("high")
    if not isinstance(peak, (int, float)):
        return "no finite value" if peak is not None else ""
    if low is not None and peak < low:
        return f"down to {_number(peak)} (limit {_number(low)})"
    if high is not None:
        return f"up to {_number(peak)} (limit {_number(high)})" if high else f"up to {_number(peak)}, and should be 0"
    return _number(peak)


def _number(value: float) -> str:
    """Three digits, and thousands as people write them."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _guard(journal: JournalReader) -> list[dict[str, Any]]:
    return [
        {
            **{name: event.get(name, "") for name in ("code", "stage", "title", "where", "why", "fix", "link")},
            "source": "guard",
            "statistic": None,
            "level": event.get("level", "warning"),
            "layers": [str(name) for name in event.get("layers", [])],
            "first": event["step"],
            "last": event["step"],
            "past": bool(event.get("mended")),
            "text": event.get("seen", ""),
            "cause": event.get("follows"),
            "urgency": None,
            "rule": event.get("code", ""),
        }
        for event in journal.events["finding"]
        if "step" in event
    ]


def _group(found: list[dict[str, Any]]) -> None:
    """Say of each finding which earlier one it follows from; one that nothing is known of stands by itself."""
    for place, each in enumerate(found):
        cause = each.pop("cause")
        heads = (other for other, earlier in enumerate(found[:place]) if earlier["follows"] is None)
        each["follows"] = next((other for other in heads if _is(found[other], cause)), None)


def _by_level(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the findings with the worst level first, and of a level what is over last."""
    order = sorted(range(len(found)), key=lambda at: (_LEVELS.get(found[at]["level"], 3), found[at]["past"]))
    places = {old: new for new, old in enumerate(order)}
    return [{**found[at], "follows": places.get(found[at]["follows"])} for at in order]


def _is(finding: dict[str, Any], cause: Any) -> bool:
    """A finding's cause is a rule's code; an episode's is the layer, statistic and first step of another."""
    if isinstance(cause, list):
        return [*finding["layers"][:1], finding["statistic"], finding["first"]] == cause
    return bool(cause is not None and finding["code"] == cause)
