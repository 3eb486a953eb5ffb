"""What a checkpoint file tells about its batch-norm layers, without the code that made it.

Files are read by ``torch.load(weights_only=True)``: code in a hostile pickle is refused, not run.
"""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_bn.rules import RULES, Level

__all__ = [
    "CheckpointHealth",
    "CheckpointRefusedError",
    "HealthFinding",
    "LayerDrift",
    "LayerHealth",
    "StateDrift",
    "compare_checkpoints",
    "inspect_checkpoint",
    "read_checkpoint",
]

EPS = 1e-5
"""What torch's layers add to a variance by default. A file does not hold its layers' own."""

EXPLODED = 1e6
"""A variance above this is a deviation of more than 1000, a few of which from the mean 16-bit floats (65504) end."""

DEAD_SHARE = 0.5
"""Trained networks have a few dead channels; a layer with this share of them is worth a warning."""

_LEVELS: tuple[Level, ...] = ("error", "warning", "info")
_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


class CheckpointRefusedError(ValueError):
    """The file can't be read safely, or holds no batch norm."""


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

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts; what is not finite is None, as JSON has no NaN."""
        names = {name: list(getattr(self, name)) for name in ("only_first", "only_second", "other_size")}
        return {"layers": [_plain(layer) for layer in self.layers], **names}


def inspect_checkpoint(path: Path | str) -> CheckpointHealth:
    """Look at the batch-norm layers in a state_dict, or a checkpoint that holds one; no model is built and no code in
    the file runs.

    A layer is what has ``running_mean`` and ``running_var``; an instance norm that tracks statistics looks the same in
    a file.

    Raises:
        FileNotFoundError: no such file.
        CheckpointRefusedError: it holds more than tensors and plain data, is damaged, or has no batch norm.

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
    unjudged: list[str] = []
    layers = tuple(_layer_health(name, entries) for name, entries in _layers_in(Path(path), unjudged).items())
    found = [*(finding for layer in layers for finding in _findings(layer)), *_uneven(layers)]
    found += [
        HealthFinding("warning", None, name, "it has a running_mean, and no running_var of the same shape: not judged.")
        for name in unjudged
    ]
    return CheckpointHealth(layers, tuple(sorted(found, key=lambda finding: _LEVELS.index(finding.level))))


def compare_checkpoints(first: Path | str, second: Path | str) -> StateDrift:
    """Return how far the running statistics moved from one file to the other.

    Raises:
        FileNotFoundError, CheckpointRefusedError: as of `inspect_checkpoint`, for either file.
    """
    one, other = _layers_in(Path(first)), _layers_in(Path(second))
    both = [name for name in one if name in other]
    other_size = tuple(name for name in both if one[name]["running_mean"].shape != other[name]["running_mean"].shape)
    layers = [_layer_drift(name, one[name], other[name]) for name in both if name not in other_size]
    return StateDrift(
        layers=tuple(sorted(layers, key=_distance, reverse=True)),
        only_first=tuple(name for name in one if name not in other),
        only_second=tuple(name for name in other if name not in one),
        other_size=other_size,
    )


def read_checkpoint(path: Path, *, weights_only: bool = True) -> Any:
    """Load a file on the CPU.

    Raises:
        FileNotFoundError: no such file.
        CheckpointRefusedError: it is damaged, or with `weights_only` holds more than tensors and plain data.
    """
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder; give a file that is in it")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), ""
        )
        if not reason or "operand" in reason:
            reason = "it is damaged, or no file of torch.save."
        raise CheckpointRefusedError(f"{path} is refused, and nothing in it was run: {reason}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        raise CheckpointRefusedError(f"{path} is not a complete checkpoint: {error}") from error


def _layers_in(path: Path, unjudged: list[str] | None = None) -> dict[str, dict[str, Tensor]]:
    """Return each layer's own entries by its name; names of those that can't be read as a layer go to `unjudged`."""
    content = read_checkpoint(path)
    found: dict[str, dict[str, Tensor]] = {}
    for prefix, state in _states(content):
        for key, mean in state.items():
            name, _, last = key.rpartition("running_mean")
            var = state.get(f"{name}running_var")
            if last:
                continue
            label = ".".join(part for part in (prefix, name.removesuffix(".")) if part)
            if not _are_statistics(mean, var):
                (unjudged if unjudged is not None else []).append(label)
            else:
                found[label] = {
                    part: state[name + part]
                    for part in (*_ENTRIES, _MEANING)
                    if isinstance(state.get(name + part), Tensor)
                }
    if not found:
        raise CheckpointRefusedError(
            f"{path} has no batch-norm layer: no state_dict in it has a running_mean with a running_var."
        )
    return found


def _are_statistics(mean: Any, var: Any) -> bool:
    tensors = isinstance(mean, Tensor) and isinstance(var, Tensor)
    return tensors and mean.dim() == 1 and mean.numel() > 0 and mean.shape == var.shape and not mean.is_meta


_ENTRIES = ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")
_MEANING = "averaging.state_of"


def _states(content: Any, prefix: str = "", depth: int = 3) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Find the mappings that are state_dicts: the Lightning one alone where there is one, else whatever has a
    running_mean."""
    if not isinstance(content, Mapping) or not depth:
        return
    if isinstance(content.get("state_dict"), Mapping):
        yield from _states(content["state_dict"], prefix, depth - 1)
        return
    if any(isinstance(key, str) and key.rpartition(".")[2] == "running_mean" for key in content):
        yield prefix, {key: value for key, value in content.items() if isinstance(key, str)}
        return
    for key, value in content.items():
        yield from _states(value, f"{prefix}.{key}" if prefix else str(key), depth - 1)


def _layer_health(name: str, entries: Mapping[str, Tensor]) -> LayerHealth:
    tracked = entries.get("num_batches_tracked")
    mean, var = (entries[part].double() for part in ("running_mean", "running_var"))
    values = [entries[part].double() for part in _ENTRIES if part in entries]
    (mean_min, mean_max), (var_min, var_max) = _range(mean), _range(var)
    weight_min, weight_max = _range(entries["weight"]) if "weight" in entries else (None, None)
    bias_min, bias_max = _range(entries["bias"]) if "bias" in entries else (None, None)
    return LayerHealth(
        name=name,
        channels=mean.numel(),
        batches_tracked=None if tracked is None else int(tracked),
        dead=int(((var >= 0) & (var < EPS)).sum()),
        exploded=int((var > EXPLODED).sum()),
        nonfinite=sum(int((~value.isfinite()).sum()) for value in values) + int((var < 0).sum()),
        dead_weights=int((entries["weight"] == 0).sum()) if "weight" in entries else None,
        averaging=_meaning(entries.get(_MEANING)),
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


def _meaning(saved: Tensor | None) -> str | None:
    """Return what a saved averaging says of itself, as ``Window(size=20)``."""
    return None if saved is None else bytes(saved.tolist()).decode()


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


def _layer_drift(name: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> LayerDrift:
    (mean, var), (new_mean, new_var) = (
        [state[part].double() for part in ("running_mean", "running_var")] for state in (first, second)
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
