"""Finds the batch-norm layers in what a file holds: every mapping with running statistics, at any depth."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_bn.checkpoints.stored import StoredTensor, contiguous, strided
from lightning_bn.checkpoints.unpickling import Described

_AFFINE = ("weight", "bias")
_MEANING = "averaging.state_of"
_DEEPEST = 100
_MOST = 2_000_000
# Mappings and sequences that are looked into: the optimizer of a network of 10,000 parameters has 30,000.
_MOST_MAPPINGS = 50_000
"""Members to look at; a file of a few bytes can describe more than any memory holds."""


@dataclass(frozen=True)
class StoredNorm:
    """A layer as a file has it."""

    name: str
    entries: dict[str, Tensor] = field(default_factory=dict)
    """``running_mean`` and ``running_var`` (C,), and where they are there and fit: ``weight`` and ``bias`` (C,)."""
    batches_tracked: int | None = None
    averaging: str | None = None
    """What its running statistics are, as saved."""

    @property
    def channels(self) -> int:
        return len(self.entries["running_mean"])


@dataclass(frozen=True)
class Unjudged:
    """Something of a layer, or of the file, of which nothing can be said."""

    name: str
    why: str


def norms_in(content: Any) -> tuple[list[StoredNorm], list[Unjudged]]:
    """Return the layers in a file's content, in its order, and what there is and can't be judged.

    A layer's name is its key, behind those of the mappings around it; ``state_dict`` at the top is left out. Of a model
    with several sets of statistics, each set is in the file, and the one in place once more as the layers' own, under
    which name it is returned.

    Args:
        content: mappings, sequences, `Described` objects and tensors.
    """
    norms: dict[str, StoredNorm] = {}
    unjudged: list[Unjudged] = []
    for label, state in _states(content, unjudged):
        found = [key for key, value in state.items() if _is_statistic(key) and value is not None]
        for name in dict.fromkeys(_STATISTIC.sub("", key) for key in found):
            full = printable(_joined(label, name.removesuffix(".")))
            if full in norms:  # by other keys: of a state_dict, and beside it
                full += f" ({1 + sum(each.partition(' (')[0] == full for each in norms)})"
            norm = _norm(full, name, state, unjudged)
            if norm is not None:
                norms[full] = norm
    return _without_set_in_place(list(norms.values())), unjudged


def tensors_in(content: Any) -> dict[str, Tensor | StoredTensor]:
    """Return the tensors beside the running statistics and around them, by their keys, in the order of the file."""
    found: dict[str, Tensor | StoredTensor] = {}
    for label, state in _states(content, [], every=True):
        for key, value in state.items():
            tensor = tensor_of(value)
            if tensor is not None:
                found[_joined(label, str(key))] = tensor
    return found


def printable(text: object) -> str:
    """Return text from a file as a terminal may show it: control characters are escaped.

    Example:
        >>> printable("layer\\x1b[2J")
        'layer\\\\x1b[2J'
    """
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode() for each in str(text)
    )


# As `StatisticsSets` names the module of a set.
_SET = re.compile(r"(?<![^.])set=[^.]*(\.|\Z)")
_STATISTIC = re.compile(r"(?<![^.])(running_mean|running_var|num_batches_tracked)\Z")


def _is_statistic(key: Any) -> bool:
    return isinstance(key, str) and _STATISTIC.search(key) is not None


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _without_set_in_place(norms: list[StoredNorm]) -> list[StoredNorm]:
    own: dict[str, StoredNorm] = {}
    sets: dict[str, dict[str, dict[str, StoredNorm]]] = {}  # by their module and the name of a set: its layers
    for norm in norms:
        place = _SET.search(norm.name)
        if place is None:
            own[norm.name] = norm
        else:
            layers = sets.setdefault(norm.name[: place.start()], {}).setdefault(place[0], {})
            layers[norm.name[place.end() :]] = norm
    copies: set[str] = set()
    for parts in sets.values():
        in_place = next((each for each in parts.values() if _is_in_place(each, own)), {})
        copies.update(norm.name for norm in in_place.values())
    return [norm for norm in norms if norm.name not in copies]


def _is_in_place(layers: dict[str, StoredNorm], own: dict[str, StoredNorm]) -> bool:
    """Whether some model in the file has, as its own layers, all these tensors."""
    path = next(iter(layers))
    models = [name.removesuffix(path) for name in own if f".{name}".endswith(f".{path}" if path else "")]
    return any(all(_is_copy(part, own.get(model + path)) for path, part in layers.items()) for model in models)


def _is_copy(part: StoredNorm, layer: StoredNorm | None) -> bool:
    return (
        layer is not None
        and part.batches_tracked == layer.batches_tracked
        and part.entries.keys() <= layer.entries.keys()
        and all(_equal(value, layer.entries[name]) for name, value in part.entries.items())
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other.to(one.dtype), rtol=0, atol=0, equal_nan=True)


def _states(content: Any, unjudged: list[Unjudged], *, every: bool = False) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every mapping with a key of running statistics, or with any key, by the keys that lead to it."""
    left = _MOST_MAPPINGS
    waiting: list[tuple[str, Any, int]] = [("", [content], -1)]
    while waiting:
        label, value, depth = waiting.pop()
        members: list[tuple[str, Any]] = []
        if isinstance(value, Described):
            members = _described(value)
        elif isinstance(value, Mapping):
            if every or any(_is_statistic(key) for key in value):
                yield label, value
            members = [("" if depth == 0 and key == "state_dict" else str(key), each) for key, each in value.items()]
        else:
            members = [("" if depth < 0 else str(place), each) for place, each in enumerate(value)]
        members = [(key, each) for key, each in members if isinstance(each, (Described, Mapping, list, tuple))]
        left -= len(members)
        if members and (depth == _DEEPEST or left < 0):
            unjudged.append(Unjudged("", "it holds more than is looked at: mappings in mappings without an end"))
            return
        waiting.extend((_joined(label, key), each, depth + 1) for key, each in reversed(members))


def _described(value: Described) -> list[tuple[str, Any]]:
    """What an object that was not built has inside of it; a pickled module as the mapping that its state_dict is."""
    if tensor_of(value) is not None:
        return []
    members: list[tuple[str, Any]] = [("", list_) for list_ in (value.items, *value.args, value.members) if list_]
    for state in value.state_parts():
        if isinstance(state, Mapping) and isinstance(state.get("_modules"), Mapping):
            parts = [state.get(name) for name in ("_parameters", "_buffers")]
            members.append(
                ("", {key: each for part in parts if isinstance(part, Mapping) for key, each in part.items()})
            )
            members += [(str(key), each) for key, each in state["_modules"].items()]
            state = {key: each for key, each in state.items() if not str(key).startswith("_")}
        members.append(("", state))
    return members


def _norm(full: str, name: str, state: Mapping[Any, Any], unjudged: list[Unjudged]) -> StoredNorm | None:
    def told(why: str) -> None:
        unjudged.append(Unjudged(full, f"{why}: not judged."))

    mean, var = _values(state.get(f"{name}running_mean")), _values(state.get(f"{name}running_var"))
    if isinstance(mean, str):
        told(f"its running_mean {mean}")
        return None
    if isinstance(var, str):
        told(f"its running_var {var}")
        return None
    if mean.shape != var.shape or mean.dim() != 1:
        told(f"its running_mean is {_shape(mean)}, its running_var {_shape(var)}; both should be (channels,)")
        return None
    entries = {"running_mean": mean, "running_var": var}
    for part in _AFFINE:
        if state.get(name + part) is not None:
            value = _values(state[name + part])
            if isinstance(value, str):
                told(f"its {part} {value}")
            elif value.shape != mean.shape:
                told(f"its {part} is {_shape(value)} where there are {len(mean)} channels")
            else:
                entries[part] = value
    tracked = _tracked(state.get(f"{name}num_batches_tracked"), told)
    return StoredNorm(full, entries, tracked, _meaning(state.get(name + _MEANING), told))


def _values(value: Any) -> Tensor | str:
    """The numbers of an entry, or what is the matter with it."""
    if value is None:
        return "is missing"
    stored = tensor_of(value)
    if stored is None:
        return (
            f"is no tensor but {printable(value.full_name() if isinstance(value, Described) else type(value).__name__)}"
        )
    if len(stored.shape) > 1 or 0 in stored.shape or (stored.shape and stored.shape[0] > _MOST):
        return f"has the shape {tuple(stored.shape)}"
    try:
        tensor = stored if isinstance(stored, Tensor) else stored.load()
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex():
            return f"is of a kind that holds no real numbers ({tensor.dtype}, {tensor.layout}, {tensor.device})"
        return tensor.detach()
    except Exception as error:  # damaged bytes raise whatever the reader trips over
        return f"can't be read ({printable(error)})"


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))}{',' * (tensor.dim() == 1)})"


def _tracked(value: Any, told: Callable[[str], None]) -> int | None:
    if value is None:
        return None
    found = _values(value)
    if isinstance(found, Tensor) and found.numel() == 1:
        number = float(found.double())
        if number >= 0 and number == int(min(number, 2.0**63)):
            return int(number)
        found = f"is {number:g}"
    told(f"its num_batches_tracked {found if isinstance(found, str) else f'has {found.numel()} values'}")
    return None


def _meaning(value: Any, told: Callable[[str], None]) -> str | None:
    """What a saved averaging says of itself, as ``Window(size=20)``."""
    if value is None:
        return None
    text = _values(value)
    try:
        if isinstance(text, Tensor):
            return printable(bytes(text.tolist()).decode())
        told(f"its averaging.state_of {text}")
    except (TypeError, ValueError):
        told("its averaging.state_of is no text")
    return None


def tensor_of(value: Any) -> Tensor | StoredTensor | None:
    """Return the tensor that a leaf is or describes, None where it is something else."""
    if isinstance(value, (Tensor, StoredTensor)):
        return value
    if not isinstance(value, Described):
        return None
    try:
        return _described_tensor(value)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


def _described_tensor(value: Described) -> StoredTensor | None:
    name, args = value.full_name(), value.args
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return _described_tensor(args[0])
    if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
        storage, offset, shape, stride = args[:4]
        return strided(storage.read, storage.dtype, offset, shape, stride)
    if name.startswith("numpy.") and name.endswith(".multiarray._reconstruct"):
        _, shape, kind, fortran, data = value.state
        if len(shape) > 1 and fortran:
            return None
        return strided(lambda start, stop: data[start:stop], _NUMPY[kind.args[0]], 0, shape, contiguous(shape))
    return None


_NUMPY = {"f8": torch.float64, "f4": torch.float32, "f2": torch.float16, "i8": torch.int64, "u1": torch.uint8}
