"""Where the layers of a model are, to see at little cost that another module stands in for one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class Place(NamedTuple):
    """An attribute of a module that leads to a layer."""

    parent: nn.Module
    name: str
    child: nn.Module


def places_of(layers: Collection[nn.Module], model: nn.Module) -> list[Place]:
    """Return all places on the ways from `model` to `layers`, each once; a layer may be at several."""
    found: dict[tuple[int, str], Place] = {}
    for path, layer in model.named_modules(remove_duplicate=False):
        if layer in layers:
            parent = model
            for name in path.split(".") if path else ():
                child = parent.get_submodule(name)
                found[id(parent), name] = Place(parent, name, child)
                parent = child
    return list(found.values())


def are_held(places: Iterable[Place]) -> bool:
    """Whether the same modules are there as before."""
    return all(parent._modules.get(name) is child for parent, name, child in places)


def has_tensors_of(new: _BatchNorm, old: _BatchNorm) -> bool:
    """Whether a layer was made of another, and has its running statistics or its weight."""
    return new._buffers["running_mean"] is old._buffers["running_mean"] or (
        new._parameters.get("weight") is not None and new._parameters["weight"] is old._parameters.get("weight")
    )
