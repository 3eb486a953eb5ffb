"""Illnesses of layers: since when, until when, how bad at worst, which of them is the cause, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lightning_bn.activations.call_sites import INPUT
from lightning_bn.activations.column import Statistic
from lightning_bn.activations.registry import STATISTICS
from lightning_bn.activations.sample import Sample

STAGES = {"train": "training", "val": "validation", "test": "test"}

HEALTHY = "Healthy: "

# Causes that are told in full; the others are one line each.
MAX_TOLD = 3
MAX_LISTED = 10

# A run in which everything is sick all the time has more episodes than anybody reads; the earliest tell what happened.
MAX_GROUPED = 1000


@dataclass(frozen=True)
class Episode:
    """A layer's statistic that went beyond its limits at one sample and stayed there until another.

    Args:
        layer: name of the row: the layer, with ``#2`` for its second call in a forward; ``input``, what the model is
            given.
        statistic: name of the column, such as ``"dead_fraction"``.
        first: step of the first sample at which it was beyond its limits.
        last: step of the last one.
        peak: the value that was farthest beyond the limit.
        recovered: whether a later sample found it within its limits.
        stage: ``"train"``, ``"val"`` or ``"test"``.
        value: the value at `last`.
        limit: the limit that it is beyond.
        order: place of the layer in forward order, from 0.
        before: step of the sample before `first`, None where it was the first one.

    Example:
        >>> from lightning_bn import Episode
        >>> episode = Episode("relu#2", "dead_fraction", first=20, last=80, peak=1.0, recovered=False, limit=0.25)
        >>> print(episode)
        relu#2: share of channels that are dead 1 (limit 0.25) since step 20
    """

    __module__ = "lightning_bn"

    layer: str
    statistic: str
    first: int
    last: int
    peak: float
    recovered: bool
    stage: str = "train"
    value: float = np.nan
    limit: float = np.nan
    order: int = 0
    before: int | None = None

    @property
    def label(self) -> str:
        """What the statistic is, in words."""
        return STATISTICS[self.statistic].label

    @property
    def advice(self) -> str:
        """What to do about it."""
        advice = STATISTICS[self.statistic].remedy(self.peak)
        is_between = self.before is not None and self.first - self.before > 1
        if self.statistic == "nonfinite" and is_between and self.order <= 1:
            # One optimizer step makes NaN of all weights; then the first layer has it, and where it began is lost.
            advice += (
                f" It came after step {self.before}, between two samples, and an optimizer step takes NaN to all "
                "layers: every_n_steps=1 names the layer in which it begins."
            )
        return advice

    def __str__(self) -> str:
        if self.first == self.last:
            when = f"at step {self.first}"
        else:
            when = f"from step {self.first} to {self.last}" if self.recovered else f"since step {self.first}"
        where = "" if self.stage == "train" else f" in {STAGES.get(self.stage, self.stage)}"
        return f"{self.layer}: {self.label} {self.peak:.4g} (limit {self.limit:g}) {when}{where}"


class Episodes:
    """All episodes of a run, as its samples come in."""

    def __init__(self) -> None:
        self._past: list[Episode] = []
        self._open: dict[tuple[str, str, str], Episode] = {}  # by stage, layer and statistic
        self._newest: dict[str, int] = {}  # by stage, the step of its newest sample
        self.begun = 0
        """How many there have been."""

    def take(self, stage: str, step: int, sample: Sample) -> list[Episode]:
        """Take the newest sample of a stage in, and return the episodes that begin in it."""
        known = set(self._open)
        sick = sample.sick()
        statistics = list(STATISTICS.values())
        now: set[tuple[str, str, str]] = set()
        for row, place in np.argwhere(sick).tolist():
            statistic, layer = statistics[place], sample.layers[row]
            value = float(sample.column(statistic.name)[0][row])
            key = (stage, layer, statistic.name)
            now.add(key)
            self._extend(key, statistic, step, value)
        self._newest[stage] = step
        ended = [key for key in self._open if key[0] == stage and key not in now]
        rows = {layer: row for row, layer in enumerate(sample.layers)} if ended else {}
        for key in ended:
            # A layer that was not called, or that gave nothing but NaN, tells nothing, neither good nor bad.
            values, told = sample.column(key[2])
            at = rows.get(key[1])
            if at is not None and told[at] and not np.isnan(values[at]):
                self._past.append(replace(self._open.pop(key), recovered=True))
        return [each for key, each in self._open.items() if key not in known]

    @property
    def recovered(self) -> int:
        """How many of them have recovered."""
        return len(self._past)

    def state_dict(self) -> dict[str, Any]:
        """Return all there have been, as plain numbers and strings, for a run that goes on in another process."""
        found = [asdict(each) for each in (*self._past, *self._open.values())]
        return {"episodes": found, "newest": dict(self._newest), "begun": self.begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        known = [Episode(**each) for each in state["episodes"]]
        self._past = [each for each in known if each.recovered]
        self._open = {(each.stage, each.layer, each.statistic): each for each in known if not each.recovered}
        self._newest, self.begun = dict(state["newest"]), state["begun"]

    def _extend(self, key: tuple[str, str, str], statistic: Statistic, step: int, value: float) -> None:
        known = self._open.get(key)
        if known is None:
            self.begun += 1
            stage, layer, name = key
            limit = statistic.limit(value)
            before = self._newest.get(stage)
            self._open[key] = Episode(layer, name, step, step, value, False, stage, value, limit, before=before)
        else:
            is_below = known.limit == statistic.low and known.peak < statistic.low
            peak = min(known.peak, value) if is_below else max(known.peak, value)
            self._open[key] = replace(known, last=step, value=value, peak=peak)

    def all(self, order: Mapping[str, int]) -> list[Episode]:
        """Return all episodes, the earliest first, and of those that began together the most upstream.

        Args:
            order: by layer, its place in the forward.
        """
        return in_order((*self._past, *self._open.values()), order)


def in_order(episodes: Iterable[Episode], order: Mapping[str, int]) -> list[Episode]:
    """Return episodes with the places of their layers, the earliest first, and of those that began together the most
    upstream."""
    return sorted((replace(each, order=order.get(each.layer, len(order))) for each in episodes), key=urgency)


def urgency(episode: Episode) -> tuple[int, int, bool, int, int, int]:
    """Return by what episodes are sorted, so that what comes first is the cause."""
    stages = list(STAGES)
    stage = stages.index(episode.stage) if episode.stage in stages else len(stages)
    statistic = STATISTICS[episode.statistic]
    # Where a layer dies its channels, and those below it, die one by one. So a lone channel waits for one sampling
    # interval: what befalls a whole layer by then comes first.
    is_lone = statistic.family == "channel"
    waits = episode.first - episode.before if is_lone and episode.before is not None else 0
    # Of one sample: running statistics are looked at before its forward, gradients come after it, from below.
    is_before = episode.statistic == "running_nonfinite" or episode.layer == INPUT
    moment = 0 if is_before else 2 if statistic.of == "gradient" else 1
    return episode.first + waits, stage, is_lone, moment, episode.order, statistic.rank


@dataclass(frozen=True)
class Cause:
    """An illness that nothing before it explains, and those that it explains, in the order of `Episodes.all`."""

    episode: Episode
    followers: tuple[Episode, ...] = ()

    @property
    def is_over(self) -> bool:
        """Whether all of it has recovered."""
        return all(each.recovered for each in (self.episode, *self.followers))

    @property
    def layers(self) -> tuple[str, ...]:
        """The other layers that follow, in forward order, each once."""
        others = sorted(
            (each for each in self.followers if each.layer != self.episode.layer), key=lambda each: each.order
        )
        return tuple(dict.fromkeys(each.layer for each in others))


# What goes wrong below a layer because of what goes wrong in it, by kind: a family, or "vanishing", too small a scale.
_BELOW: dict[str, set[str]] = {
    "scale": {"scale", "vanishing"},
    "vanishing": {"scale", "vanishing", "silence", "drift", "channel"},
    "silence": {"scale", "vanishing", "silence", "drift", "channel"},
    "saturation": {"scale", "vanishing", "saturation", "silence", "drift", "channel"},
    "drift": {"drift"},
    "affine": {"scale", "vanishing", "silence", "affine", "channel"},
    "channel": {"channel", "silence"},
}
# What goes wrong anywhere, since the gradient brings it up.
_ANYWHERE: dict[str, set[str]] = {
    "scale": {"numbers", "saturation", "drift", "silence", "gradient", "channel"},
    "vanishing": {"gradient"},
    "silence": {"gradient"},
    "saturation": {"gradient"},
    "affine": {"gradient"},
}
# What goes wrong anywhere at a later sample, as the gradient of exploded activations moves all weights.
_LATER: dict[str, set[str]] = {"scale": {"scale", "vanishing"}}


def _kind(episode: Episode) -> str:
    family = STATISTICS[episode.statistic].family
    return "vanishing" if family == "scale" and episode.peak < episode.limit else family


class _Group:
    """A cause and what follows from it, directly or by way of another follower."""

    def __init__(self, cause: Episode) -> None:
        self.members = [cause]
        self.until = -np.inf  # the last step at which something of it was sick
        # By kind and stage, the most upstream and the earliest member.
        self._upstream: dict[tuple[str, str], int] = {}
        self._earliest: dict[tuple[str, str], int] = {}
        self._extend(cause)

    def add(self, follower: Episode) -> None:
        self.members.append(follower)
        self._extend(follower)

    def _extend(self, member: Episode) -> None:
        self.until = max(self.until, float(member.last) if member.recovered else np.inf)
        key = _kind(member), member.stage
        self._upstream[key] = min(member.order, self._upstream.get(key, member.order))
        self._earliest[key] = min(member.first, self._earliest.get(key, member.first))

    def explains(self, later: Episode) -> bool:
        """Whether an episode that begins while the group lasts follows from it."""
        cause = self.members[0]
        # What it brought about shows at the next sample, at which it may be over.
        since = later.first if later.before is None or later.stage != cause.stage else later.before
        if self.until < since:
            return False
        if cause.layer == later.layer and cause.stage in (later.stage, "train"):
            return True
        kind = _kind(later)
        for (of, stage), order in self._upstream.items():
            if stage not in (later.stage, "train"):
                continue
            if of in ("numbers", "input") or kind in _ANYWHERE.get(of, ()):
                return True
            if kind in _BELOW.get(of, ()) and later.order >= order:
                return True
            if kind in _LATER.get(of, ()) and later.first > self._earliest[of, stage]:
                return True
        return False


def causes(episodes: Iterable[Episode]) -> list[Cause]:
    """Group episodes by their cause.

    The earliest, and of those that began together the most upstream, is a cause. While it or what follows from it
    lasts, what begins in the same layer follows from it; so does what begins downstream and is of a kind that it or a
    follower brings about, as a dead layer does silence; and from NaN, or an input that is wrong, everything does.
    """
    groups: list[_Group] = []
    for episode in sorted(episodes, key=urgency):
        group = next((each for each in groups if each.explains(episode)), None)
        if group is None:
            groups.append(_Group(episode))
        else:
            group.add(episode)
    return [Cause(each.members[0], tuple(each.members[1:])) for each in groups]


def verdict(
    episodes: Sequence[Episode], *, layers: int, samples: Mapping[str, int], warm_up: int | None = None
) -> list[str]:
    """Return what to tell at the end of a run, as lines of text.

    Args:
        episodes: all of the run.
        layers: how many rows have a statistic with limits.
        samples: by stage, how many samples were taken.
        warm_up: step of the last training sample with a cell in warm-up; None: there was none.
    """
    seen = " and ".join(
        f"{number} {'sample' if number == 1 else 'samples'} of {STAGES.get(stage, stage)}"
        for stage, number in samples.items()
        if number
    )
    if not seen:
        return ["Nothing was seen: no sample was taken."]
    if not episodes:
        warm = "" if warm_up is None else f" Running statistics or weights were still in warm-up until step {warm_up}."
        return [f"{HEALTHY}{layers} layers were within their limits at {seen}.{warm}"]
    # What is sick still comes first.
    groups = sorted(causes(episodes[:MAX_GROUPED]), key=lambda cause: cause.is_over)
    lines = []
    for number, cause in enumerate(groups):
        if number < MAX_TOLD:
            lines += [_headline(cause), f"  {_following(cause)}", f"  To do: {cause.episode.advice}"]
        elif number < MAX_LISTED:
            lines.append(_headline(cause))
    if len(groups) > MAX_LISTED:
        lines.append(f"And {len(groups) - MAX_LISTED} more: monitor.episodes() has them all.")
    return lines


def not_healthy(lines: Sequence[str]) -> list[str]:
    """Return a verdict without the word that no run deserves in which there is a mistake."""
    return [line.removeprefix(HEALTHY) for line in lines]


def _headline(cause: Cause) -> str:
    return f"{'Was sick' if cause.episode.recovered else 'Sick'}: {cause.episode}."


def _following(cause: Cause) -> str:
    layers = cause.layers
    if not layers:
        return "No other layer follows."
    where = (
        "below it " if all(each.order > cause.episode.order for each in cause.followers if each.layer in layers) else ""
    )
    names = ", ".join(layers) if len(layers) < 4 else f"{layers[0]}, {layers[1]}, ... {layers[-1]}"
    return (
        f"{len(layers)} {'layer' if len(layers) == 1 else 'layers'} "
        f"{where}{'follows' if len(layers) == 1 else 'follow'}: {names}."
    )
