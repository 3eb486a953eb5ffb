"""Which rows a sample has, and which of what was measured goes into which of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.activations.call_sites import CallSite, label_of
from lightning_bn.activations.functional_calls import SUM, function_of, functional_bounds, is_activation_function
from lightning_bn.activations.moments_to_pool import Key
from lightning_bn.activations.pool_to_host import Flags
from lightning_bn.activations.watched_layers import bounds_of, is_norm_layer, normalised_width

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class RowLayout:
    """The rows of a sample, R in all, and by kind of measurement the row of each thing measured."""

    labels: tuple[str, ...]
    modules: tuple[str, ...]
    activations: Indices  # of each activation, and of what the model is given
    gradients: Indices  # of each gradient
    norms: Indices  # of each batch norm, its first row
    weights: Indices  # of each layer whose weights took a step, likewise
    follows: Indices  # of each batch norm, the row after it or of its own activation, or its own where it is the last
    flags: Flags  # of the activations
    keys: tuple[Key, ...]  # of the rows; of a batch norm that did not run, one of width 0


class RowNames:
    """Names of rows, which a place keeps over all samples."""

    def __init__(self) -> None:
        self._is_alone: dict[str, bool] = {}
        self._first_width: dict[CallSite, int] = {}

    def label(self, key: Key, calls: int) -> str:
        """Return the name of the row of a key whose path was called so many times."""
        is_alone = self._is_alone.setdefault(key.place.name, calls == 1) and key.place.call == 1
        label = label_of(key.place, is_alone)
        first = self._first_width.setdefault(key.place, key.width) if key.width else key.width
        return label if key.width == first else f"{label}[{key.width}]"


def lay_out(
    names: RowNames,
    order: Mapping[Key, str],
    keys: Sequence[Key],
    layers: Mapping[str, nn.Module],
    *,
    outputs: Collection[CallSite],
    images: Collection[Key],
    weighted: Sequence[str] = (),
    hidden_norms: bool = False,
) -> RowLayout:
    """Return the layout of what was measured.

    Args:
        names: of the rows so far.
        order: of activations in forward order, and the module that each is of.
        keys: of what was measured.
        layers: by name.
        outputs: places whose activation is what the model returns.
        images: inputs of which each channel has several values a sample.
        weighted: layers whose weights took a step, in registration order.
        hidden_norms: whether the model has batch norms and none is among `layers`, so that any may feed a row.
    """
    by_place: dict[CallSite, list[Key]] = {}
    for key in sorted(order, key=lambda key: key.what != "given"):  # which is the first of the rows
        by_place.setdefault(key.place, []).append(key)
    called = {key.place: name for key, name in order.items()}
    norms = [name for name, layer in layers.items() if isinstance(layer, _BatchNorm)]
    modules = {*order.values()}
    for name in norms:
        if name not in modules:
            by_place[CallSite(name, 1)] = []
    by_place = _with_weighted(by_place, called, weighted)
    calls: dict[str, int] = {}
    for place in by_place:
        calls[place.name] = max(calls.get(place.name, 0), place.call)
    rows = [key for place, found in by_place.items() for key in found or [Key("activation", place, 0)]]
    labels = tuple(names.label(key, calls[key.place.name]) for key in rows)
    module_of = [called.get(key.place, key.place.path) for key in rows]
    row_of = {key: row for row, key in reversed(list(enumerate(rows)))}
    first_row: dict[str, int] = {}
    # Drift is that of the set in place between batches: of a layer's rows, the first with that.
    for row in sorted(range(len(rows)), key=lambda row: rows[row].place.other_set is not None):
        first_row.setdefault(module_of[row], row)
    measured = [key for key in keys if key.what in ("activation", "given")]
    own_rows = np.array([first_row[name] for name in norms], dtype=np.int64)
    return RowLayout(
        labels,
        tuple(module_of),
        np.array([row_of[key] for key in measured], dtype=np.int64),
        np.array([row_of[key._replace(what="activation")] for key in keys if key.what == "gradient"], dtype=np.int64),
        own_rows,
        np.array([first_row[name] for name in weighted], dtype=np.int64),
        np.array(
            [_row_after(name, row, module_of) for name, row in zip(norms, own_rows.tolist(), strict=True)],
            dtype=np.int64,
        ),
        _flags(rows, [row_of[key] for key in measured], module_of, layers, outputs, images, hidden_norms),
        tuple(rows),
    )


def _with_weighted(
    by_place: dict[CallSite, list[Key]], called: Mapping[CallSite, str], weighted: Sequence[str]
) -> dict[CallSite, list[Key]]:
    """Put each layer that has weights and no row before the next one that has both."""
    modules = {called.get(place, place.path) for place in by_place}
    before: dict[str, list[str]] = {}  # by name of the next layer, "" where none follows
    anchor = ""
    for name in reversed(weighted):
        if name in modules:
            anchor = name
        else:
            before.setdefault(anchor, []).insert(0, name)
    if not before:
        return by_place
    found: dict[CallSite, list[Key]] = {}
    for place, keys in by_place.items():
        found |= {CallSite(name, 1): [] for name in before.pop(called.get(place, place.path), [])}
        found[place] = keys
    return found | {CallSite(name, 1): [] for name in before.get("", [])}


def _row_after(name: str, row: int, modules: Sequence[str]) -> int:
    """The row of what a batch norm feeds: an activation that is a part of it, which runs before it ends, or the next
    row."""
    if row > 0 and modules[row - 1].startswith(f"{name}."):
        return row - 1
    return min(row + 1, len(modules) - 1)


def _flags(
    rows: Sequence[Key],
    places: Sequence[int],
    module_of: Sequence[str],
    layers: Mapping[str, nn.Module],
    outputs: Collection[CallSite],
    images: Collection[Key],
    hidden_norms: bool,
) -> Flags:
    def each(values: Sequence[bool]) -> NDArray[np.bool_]:
        return np.array(values, dtype=bool)

    rows = [rows[place] for place in places]
    is_input = [key.what == "given" for key in rows]
    named = list(zip([module_of[place] for place in places], is_input, strict=True))
    return Flags(
        is_function=each([not given and is_function(name, layers) for name, given in named]),
        is_bounded=each([not given and bounds_of_row(name, layers) is not None for name, given in named]),
        is_output=each([key.place in outputs for key in rows]),
        is_input=each(is_input),
        is_stream=each([not given and _is_stream(name, layers) for name, given in named]),
        has_positions=each([key in images for key in rows]),
        is_centred=each([hidden_norms or _is_centred(place, module_of, layers) for place in places]),
    )


def _is_centred(row: int, modules: Sequence[str], layers: Mapping[str, nn.Module]) -> bool:
    """Whether a batch norm feeds a row, by itself, by way of a residual sum, or as the module that the row is a part
    of."""

    def is_norm(name: str) -> bool:
        return isinstance(layers.get(name), _BatchNorm)

    parts = modules[row].split(".")
    if any(is_norm(".".join(parts[:number])) for number in range(1, len(parts))):
        return True
    before = row - 2 if row > 1 and function_of(modules[row - 1]) == SUM else row - 1
    return before >= 0 and is_norm(modules[before])


def is_function(name: str, layers: Mapping[str, nn.Module]) -> bool:
    """Tell whether zeros in a row's activations say something: those of all but norms and sums do."""
    function = function_of(name) if name not in layers else None
    return is_activation_function(function) if function else not is_norm_layer(name, layers[name])


def bounds_of_row(name: str, layers: Mapping[str, nn.Module]) -> tuple[float, float] | None:
    """Return the least and the greatest value that a module, or a function, can give; None: it has none."""
    return bounds_of(layers[name]) if name in layers else functional_bounds(function_of(name) or "")


def _is_stream(name: str, layers: Mapping[str, nn.Module]) -> bool:
    return normalised_width(layers[name]) is not None if name in layers else not is_function(name, layers)
