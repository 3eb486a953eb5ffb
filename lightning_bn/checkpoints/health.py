"""What a checkpoint file tells about its batch-norm layers, without the code that made it.

Nothing in a file runs: see `reading`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_bn.checkpoints.norms import StoredNorm, Unjudged, norms_in, printable
from lightning_bn.checkpoints.reading import CheckpointRefusedError, Contents, read_contents
from lightning_bn.rules import RULES, Level

EPS = 1e-5
"""What torch's layers add to a variance by default. A file does not hold its layers' own."""

EXPLODED = 1e6
"""A variance above this is a deviation of more than 1000, a few of which from the mean 16-bit floats (65504) end."""

DEAD_SHARE = 0.5
"""Trained networks have a few dead channels; a layer with this share of them is worth a warning."""

_LEVELS: tuple[Level, ...] = ("error", "warning", "info")
_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class HealthFinding:
    """Something seen in a checkpoint."""

    level: Level
    rule: str | None
    """The code of the rule it belongs to, where there is one."""
    layer: str
    """The layer's name; the empty string where it is about several."""
    text: str


@dataclass(frozen=True)
class LayerHealth:
    """What a file holds of one batch-norm layer. Ranges are over channels and leave out what is not finite; NaN where
    nothing is left."""

    name: str
    channels: int
    batches_tracked: int | None
    """``num_batches_tracked``; None where the file has none."""
    mean_min: float
    mean_max: float
    var_min: float
    var_max: float
    dead: int
    """Channels whose running variance is below 1e-5, torch's default eps: what the layer gives is nearly constant."""
    exploded: int
    """Channels whose running variance is above 1e6."""
    nonfinite: int
    """NaN and infinite entries in statistics, weight and bias, and negative variances."""
    weight_min: float | None
    weight_max: float | None
    bias_min: float | None
    bias_max: float | None
    dead_weights: int | None
    """Channels whose affine weight is 0: what the layer gives there is its bias, whatever comes in. None without
    one."""
    averaging: str | None
    """What its running statistics are, as saved; None where the file says nothing, as of torch's exponential average,
    of which nothing is saved."""
    dtype: str
    """Of the running statistics."""
    untouched: bool
    """Whether mean is 0 and variance 1 in all channels, which no data has."""
    mode: str | None = None
    """Of an exported program: "running", or "batch" where it normalises with its batch."""


@dataclass(frozen=True)
class CheckpointHealth:
    """What `inspect_checkpoint` saw: the layers in the order of the file, and the findings, worst first."""

    layers: tuple[LayerHealth, ...]
    findings: tuple[HealthFinding, ...]

    @property
    def sound(self) -> bool:
        """Whether there is nothing to do: no finding is more than information."""
        return all(finding.level == "info" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts; what is not finite is None, as JSON has no NaN."""
        return {
            "layers": [_plain(layer) for layer in self.layers],
            "findings": [asdict(finding) for finding in self.findings],
        }


@dataclass(frozen=True)
class LayerDrift:
    """How far a layer's statistics are from those in another file. The unit of the mean is ``sqrt(first var +
    1e-5)``."""

    name: str
    mean_shift_max: float
    """Largest ``|second mean - first mean| / sqrt(first var + eps)`` over channels."""
    mean_shift_rms: float
    log_variance_ratio_max: float
    """Largest ``|log((second var + eps) / (first var + eps))|`` over channels."""
    log_variance_ratio_rms: float


@dataclass(frozen=True)
class StateDrift:
    """What `compare_checkpoints` saw: the layers that both files have, the farthest first, and the names that only one
    has."""

    layers: tuple[LayerDrift, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    other_size: tuple[str, ...]
    """Layers whose number of channels differs."""
    unjudged: tuple[str, ...] = ()
    """What can't be judged, in either file, and why."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts; what is not finite is None, as JSON has no NaN."""
        names = {name: list(getattr(self, name)) for name in ("only_first", "only_second", "other_size", "unjudged")}
        return {"layers": [_plain(layer) for layer in self.layers], **names}


def inspect_checkpoint(path: Path | str) -> CheckpointHealth:
    """Look at the batch-norm layers in a file, wherever in it they are; no model is built and no code in the file runs.

    A layer is what has ``running_mean`` and ``running_var``; an instance norm that tracks statistics looks the same in
    a file.

    Args:
        path: a state_dict or a checkpoint of any package (``torch.save``, pickle, safetensors, npz), or a folder of
            model files.

    Raises:
        FileNotFoundError: no such file.
        CheckpointRefusedError: it is of another kind, is damaged, or has no batch norm.

    Example:
        >>> import torch
        >>> from lightning_bn.checkpoints.health import inspect_checkpoint
        >>> torch.save(torch.nn.Sequential(torch.nn.BatchNorm2d(8)).state_dict(), "fresh.pt")
        >>> health = inspect_checkpoint("fresh.pt")
        >>> [(layer.name, layer.channels, layer.batches_tracked) for layer in health.layers]
        [('0', 8, 0)]
        >>> [(finding.level, finding.rule) for finding in health.findings]
        [('warning', 'BN204')]
        >>> import os
        >>> os.remove("fresh.pt")
    """
    contents, norms, unjudged = _layers_of(Path(path))
    return judged(norms, _about_file(contents, unjudged))


def judged(
    norms: Iterable[StoredNorm], found: Iterable[HealthFinding], modes: Mapping[str, str] | None = None
) -> CheckpointHealth:
    """Return the figures of layers, and what is wrong with them beside what was `found`.

    Args:
        norms: the layers.
        found: findings about the whole file.
        modes: by name, what an exported program normalises a layer with.
    """
    layers = tuple(replace(_layer_health(norm), mode=(modes or {}).get(norm.name)) for norm in norms)
    every = [*found, *(finding for layer in layers for finding in _findings(layer)), *_uneven(layers)]
    return CheckpointHealth(layers, tuple(sorted(every, key=lambda finding: _LEVELS.index(finding.level))))


def compare_checkpoints(first: Path | str, second: Path | str) -> StateDrift:
    """Return how far the running statistics moved from one file to the other.

    Raises:
        FileNotFoundError, CheckpointRefusedError: as of `inspect_checkpoint`, for either file.
    """
    files = [_layers_of(path)[1:] for path in map(Path, (first, second))]
    one, other = ({norm.name: norm for norm in norms} for norms, _ in files)
    both = [name for name in one if name in other]
    other_size = tuple(name for name in both if one[name].channels != other[name].channels)
    layers = [_layer_drift(name, one[name], other[name]) for name in both if name not in other_size]
    return StateDrift(
        layers=tuple(sorted(layers, key=_distance, reverse=True)),
        only_first=tuple(name for name in one if name not in other),
        only_second=tuple(name for name in other if name not in one),
        other_size=other_size,
        unjudged=tuple(f"{each.name}: {each.why}" for _, unjudged in files for each in unjudged),
    )


def _layers_of(path: Path) -> tuple[Contents, list[StoredNorm], list[Unjudged]]:
    """Return what is in a file: its layers, and what can't be judged."""
    contents = read_contents(path)
    norms, unjudged = norms_in(contents.value)
    if not norms and not unjudged:
        raise CheckpointRefusedError(
            f"{path} has no batch-norm layer: nothing in it has a running_mean with a running_var."
        )
    return contents, norms, unjudged


def damage(records: Sequence[str]) -> Iterator[HealthFinding]:
    """Tell of records whose checksum is wrong."""
    if records:
        names = ", ".join(printable(name) for name in records[:3]) + ", ..." * (len(records) > 3)
        text = f"the file is damaged: {len(records)} of its records are not what was written: {names}."
        yield HealthFinding("error", None, "", text)


def _about_file(contents: Contents, unjudged: list[Unjudged]) -> Iterator[HealthFinding]:
    yield from damage(contents.damaged)
    for each in unjudged:
        yield HealthFinding("warning", None, each.name, each.why)
    if contents.described:
        kinds = [printable(name) for name in contents.described]
        text = (
            f"it also names {len(kinds)} classes or functions, none of which was imported or called: "
            f"{', '.join(kinds[:5])}{', ...' * (len(kinds) > 5)}."
        )
        yield HealthFinding("info", None, "", text)


def _layer_health(norm: StoredNorm) -> LayerHealth:
    entries = norm.entries
    mean, var = (entries[part].double() for part in ("running_mean", "running_var"))
    values = [value.double() for value in entries.values()]
    (mean_min, mean_max), (var_min, var_max) = _range(mean), _range(var)
    weight_min, weight_max = _range(entries["weight"]) if "weight" in entries else (None, None)
    bias_min, bias_max = _range(entries["bias"]) if "bias" in entries else (None, None)
    return LayerHealth(
        name=norm.name,
        channels=norm.channels,
        batches_tracked=norm.batches_tracked,
        dead=int(((var >= 0) & (var < EPS)).sum()),
        exploded=int((var > EXPLODED).sum()),
        nonfinite=sum(int((~value.isfinite()).sum()) for value in values) + int((var < 0).sum()),
        dead_weights=int((entries["weight"] == 0).sum()) if "weight" in entries else None,
        averaging=norm.averaging,
        dtype=str(entries["running_var"].dtype).removeprefix("torch."),
        untouched=bool((mean == 0).all() and (var == 1).all()),
        mean_min=mean_min,
        mean_max=mean_max,
        var_min=var_min,
        var_max=var_max,
        weight_min=weight_min,
        weight_max=weight_max,
        bias_min=bias_min,
        bias_max=bias_max,
    )


def _range(values: Tensor) -> tuple[float, float]:
    finite = values.double()[values.isfinite()]
    return (finite.min().item(), finite.max().item()) if finite.numel() else (math.nan, math.nan)


def _findings(layer: LayerHealth) -> Iterator[HealthFinding]:
    if layer.nonfinite:
        yield HealthFinding(
            "error", "BN203", layer.name, f"{layer.nonfinite} entries are NaN, infinite, or a negative variance."
        )
    if layer.untouched:
        text = (
            f"mean is 0 and variance 1 in all channels, with {layer.batches_tracked or 0} batches tracked: no data "
            f"has been seen."
        )
        yield HealthFinding("warning", "BN204", layer.name, text)
    if layer.exploded:
        yield HealthFinding(
            "warning",
            None,
            layer.name,
            f"{layer.exploded} of {layer.channels} channels have a variance above {EXPLODED:g}.",
        )
    if layer.dead:
        level: Level = "warning" if layer.dead >= DEAD_SHARE * layer.channels else "info"
        yield HealthFinding(
            level, None, layer.name, f"{layer.dead} of {layer.channels} channels are dead: a variance below {EPS:g}."
        )
    if layer.dead_weights:
        text = (
            f"{layer.dead_weights} of {layer.channels} channels have an affine weight of 0: they give their bias alone."
        )
        yield HealthFinding("info", None, layer.name, text)
    if layer.dtype in (str(dtype).removeprefix("torch.") for dtype in _SIXTEEN_BITS):
        yield HealthFinding("info", "BN206", layer.name, f"statistics are kept in {layer.dtype}; {RULES['BN206'].why}")


def _uneven(layers: tuple[LayerHealth, ...]) -> Iterator[HealthFinding]:
    counts = Counter(
        layer.batches_tracked for layer in layers if layer.batches_tracked is not None and not layer.untouched
    )
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        others = [layer.name for layer in layers if layer.batches_tracked not in (usual, None) and not layer.untouched]
        names = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        text = f"{len(others)} of {len(layers)} layers have not tracked {usual} batches, as the others have: {names}."
        yield HealthFinding("info", None, "", text)


def _layer_drift(name: str, first: StoredNorm, second: StoredNorm) -> LayerDrift:
    (mean, var), (new_mean, new_var) = (
        [norm.entries[part].double() for part in ("running_mean", "running_var")] for norm in (first, second)
    )
    shift = (new_mean - mean) / (var + EPS).sqrt()
    ratio = ((new_var + EPS) / (var + EPS)).log()
    return LayerDrift(name, *(figure for values in (shift, ratio) for figure in (_largest(values), _rms(values))))


def _largest(values: Tensor) -> float:
    return values.abs().max().item()


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _distance(layer: LayerDrift) -> float:
    distance = max(layer.mean_shift_rms, layer.log_variance_ratio_rms)
    return distance if math.isfinite(layer.mean_shift_rms + layer.log_variance_ratio_rms) else math.inf


def _plain(layer: LayerHealth | LayerDrift) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(layer).items()
    }
