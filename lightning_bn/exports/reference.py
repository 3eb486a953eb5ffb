r"""Compares the statistics of an exported program with those of a checkpoint, also where they were folded into weights.

A folded weight is the checkpoint's times ``r = gamma / sqrt(var + eps)`` for each channel, and the folded bias
``(bias - mean) * r + beta``; so ``var = (gamma / r)**2 - eps`` and ``mean = bias - (folded_bias - beta) / r``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bn.checkpoints.norms import StoredNorm
from lightning_bn.exports.program import Leaf, Program, WeightedUse, loaded

_EPS = (1e-5, 1e-3, 1e-6, 1e-4, 2e-5, 1e-12, 0.0)
"""A checkpoint does not hold its layers' eps, so the one that fits best of those in use is taken."""

_MATERIAL = 1e-3
"""Standard deviations of the mean, or of the logarithm of the variance, below which no answer changes visibly."""

_ROUNDINGS = 16
"""Operations that round on the way from a checkpoint to a folded weight and back, at most."""


@dataclass(frozen=True)
class Difference:
    """How far the program's statistics of a layer are from the checkpoint's."""

    name: str
    """The layer's, as the checkpoint has it."""
    folded: bool
    mean_shift: float
    """Largest ``|exported mean - mean| / sqrt(var + eps)`` over channels; NaN where the program does not tell."""
    log_variance_ratio: float
    """Largest ``|log((exported var + eps) / (var + eps))|`` over channels."""
    agrees: bool
    """Whether all of it is explained by the rounding of the exported numbers, or too little to matter."""
    capped: float | None = None
    """The largest exported variance, where several channels have just this one and the checkpoint's are larger."""


def compare(
    program: Program, norms: Mapping[str, StoredNorm], weights: Mapping[str, Leaf]
) -> Iterator[Difference | str]:
    """Yield a `Difference` for each layer of the checkpoint, or its name where the program has it nowhere.

    Args:
        program: the exported one.
        norms: the checkpoint's layers by name, in its order.
        weights: all tensors of the checkpoint by their keys, in its order.
    """
    found: dict[str, Difference] = {}
    nameless = [each for each in program.norms if not any(_same(each.name, name) for name in norms)]
    for name, norm in norms.items():
        own = next((each for each in program.norms if _same(each.name, name)), None)
        if own is None:  # a frozen program names nothing: its norms come in the order of the checkpoint's
            own = next((each for each in nameless if _alike(each, norm)), None)
        if own is not None and own.channels == norm.channels:
            nameless = [each for each in nameless if each is not own]
            found[name] = _kept(name, norm, own)
    for use in program.layers:
        pair = _unfolded(use, {name: norm for name, norm in norms.items() if name not in found}, weights)
        if pair is not None:
            found[pair.name] = pair
    for name in norms:
        yield found.get(name, name)


def _same(one: str, other: str) -> bool:
    """Whether two names are of one layer, of which a wrapper may have put something in front."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


def _alike(own: StoredNorm, norm: StoredNorm) -> bool:
    pairs = [(own.entries.get(part), norm.entries.get(part)) for part in ("weight", "bias")]
    return own.channels == norm.channels and all(
        a is None or b is None or torch.allclose(a.double(), b.double(), rtol=1e-2, atol=1e-3) for a, b in pairs
    )


def _kept(name: str, norm: StoredNorm, own: StoredNorm) -> Difference:
    """The difference of a layer that the program still has."""
    mean, var = (own.entries[part] for part in ("running_mean", "running_var"))
    allowed = torch.full((norm.channels,), _ROUNDINGS * _rounding(var.dtype), dtype=torch.float64)
    return _difference(name, norm, False, mean.double(), var.double(), _EPS[0], allowed)


def _difference(
    name: str, norm: StoredNorm, folded: bool, mean: Tensor | None, var: Tensor, eps: float, allowed: Tensor
) -> Difference:
    own_mean, own_var = (norm.entries[part].double() for part in ("running_mean", "running_var"))
    ratio = ((var + eps).clamp(min=1e-30).log() - (own_var + eps).clamp(min=1e-30).log()).abs()
    deviation = (own_var + eps).clamp(min=1e-30).sqrt()
    shift = torch.zeros_like(ratio) if mean is None else (mean - own_mean).abs() / deviation
    used = allowed.isfinite()  # a channel of weight 0 tells nothing
    agrees = bool((torch.maximum(ratio, shift)[used] <= allowed[used].clamp(min=_MATERIAL)).all())
    largest = var.max().item()
    several = int((var == largest).sum()) > 1 and bool((own_var[var == largest] > largest).all())
    return Difference(
        name,
        folded,
        float("nan") if mean is None else _largest(shift[used]),
        _largest(ratio[used]),
        agrees,
        largest if several and not folded else None,
    )


def _largest(values: Tensor) -> float:
    return values.max().item() if values.numel() else 0.0


def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _unfolded(use: WeightedUse, norms: Mapping[str, StoredNorm], weights: Mapping[str, Leaf]) -> Difference | None:
    """The difference of the layer that is folded into a weight; None where none is."""
    keys = list(weights)
    named = bool(use.name) and any(_same(f"{use.name}.weight", key) for key in keys)  # optimisers make names up
    for place, key in enumerate(keys):
        shape = tuple(weights[key].shape)
        is_matrix = len(shape) == 2
        expected = tuple(reversed(use.weight.shape)) if is_matrix and use.transposed else tuple(use.weight.shape)
        if len(shape) < 2 or shape != expected or (named and not _same(f"{use.name}.weight", key)):
            continue
        exported = _rows(loaded(use.weight), use.transposed, use.groups)
        own = _rows(loaded(weights[key]), use.transposed and not is_matrix, use.groups)
        scale = (exported * own).sum(1) / own.square().sum(1)
        rounding = _rounding(loaded(use.weight).dtype)
        rest = (exported - scale[:, None] * own).abs().amax(1)
        if not bool((rest <= _ROUNDINGS * rounding * exported.abs().amax(1) + 1e-7)[scale.isfinite()].all()):
            continue  # another weight, or one that went on learning
        if bool(((scale - 1).abs() <= _ROUNDINGS * rounding)[scale.isfinite()].all()):
            return None  # nothing is folded into it
        order = [name for name in norms if norms[name].channels == len(exported)]
        behind = [name for name in order if any(_is_behind(name, other) for other in keys[place:])]
        told = [name for name in order if use.folded and _same(use.folded, name)]
        own_bias = weights.get(f"{key.removesuffix('weight')}bias")
        each = [_of(use, name, norms[name], own_bias, scale) for name in told or behind]
        return next((one for one in each if one.agrees), each[0] if each else None)
    return None


def _is_behind(name: str, key: str) -> bool:
    return key == f"{name}.running_mean" or (not name and key == "running_mean")


def _of(use: WeightedUse, name: str, norm: StoredNorm, own_bias: Leaf | None, scale: Tensor) -> Difference:
    gamma, beta = (
        norm.entries[part].double() if part in norm.entries else torch.full_like(scale, value)
        for part, value in (("weight", 1.0), ("bias", 0.0))
    )
    weight = loaded(use.weight)
    rows = _rows(weight, use.transposed, use.groups)
    info = torch.finfo(weight.dtype)
    smallest = info.smallest_normal * info.eps  # below the normal range the spacing no longer shrinks
    rounding = _rounding(weight.dtype) + smallest / rows.square().mean(1).sqrt()
    bias = torch.zeros_like(scale) if own_bias is None else loaded(own_bias).double()
    folded = torch.zeros_like(scale) if use.bias is None else loaded(use.bias).double()
    mean = None if use.bias_elsewhere else bias - (folded - beta) / scale
    size = (2 * folded.abs() + beta.abs() + (bias * scale).abs()) / gamma.abs()
    allowed = torch.where((gamma != 0) & (scale != 0), _ROUNDINGS * rounding * (1 + size), torch.inf)
    total = (gamma / scale).square()
    each = [_difference(name, norm, True, mean, total - eps, eps, allowed) for eps in _EPS]
    return min(each, key=lambda one: (not one.agrees, one.log_variance_ratio))


def _rows(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """A weight as one row for each output channel, in float64."""
    weight = weight.double()
    if transposed:  # (in, out / groups, ...)
        weight = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return weight.reshape(len(weight), -1)
