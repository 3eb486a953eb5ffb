"""Where the layers of a model are, to see at little cost that another module stands in for one."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class Place(NamedTuple):
    """An attribute of a module that leads to a layer."""

    parent: nn.Module
    name: str
    child: nn.Module

    def is_held(self) -> bool:
        """Whether the same module is there as before."""
        return self.parent._modules.get(self.name) is self.child


def places_of(layers: Collection[nn.Module], model: nn.Module) -> list[Place]:
    """Return all places on the ways from `model` to `layers`, each once."""
    found: dict[tuple[int, str], Place] = {}
    for path, module in model.named_modules():
        if module in layers and path:
            place = model
            for name in path.split("."):
                child = place._modules[name]
                if child is None:
                    break
                found[id(place), name] = Place(place, name, child)
                place = child
    return list(found.values())


def has_tensors_of(new: _BatchNorm, old: _BatchNorm) -> bool:
    """Whether a layer was made of another, and has its running statistics or its weight."""
    return new._buffers["running_mean"] is old._buffers["running_mean"] or (
        new._parameters.get("weight") is not None and new._parameters["weight"] is old._parameters.get("weight")
    )
