"""Which set of statistics a batch-norm layer has in place, where it has several (`StatisticsSets`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

from torch import nn

_MEMBERSHIP = "_lightning_bn_sets"


class Sets(Protocol):
    """Several sets of statistics for the same layers."""

    @property
    def names(self) -> tuple[str, ...]:
        """The sets, the first of which is in place where no other is in use."""

    @property
    def active(self) -> str:
        """The set in place."""

    def use(self, name: str) -> AbstractContextManager[Any]:
        """Return a context in which the set is in place."""

    def waiting(self, layer: nn.Module) -> dict[str, nn.Module]:
        """Return, by the name of each set that is not in place, what holds the layer's tensors in it, under the names
        that they have in the layer."""


class _Membership:
    """What a layer knows of its sets. A copy of the layer by itself has none: it has what was in place."""

    def __init__(self, sets: Sets) -> None:
        self.sets = sets

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def join_sets(layer: nn.Module, sets: Sets) -> None:
    """Let the layer know which sets it has."""
    layer.__dict__[_MEMBERSHIP] = _Membership(sets)


def has_sets(layer: nn.Module) -> bool:
    """Whether the layer has several sets of statistics."""
    return layer.__dict__.get(_MEMBERSHIP) is not None


def sets_of(layer: nn.Module) -> Sets | None:
    """Return the sets of the layer; None if it has but one."""
    membership: _Membership | None = layer.__dict__.get(_MEMBERSHIP)
    return None if membership is None else membership.sets


def set_in_use(layer: nn.Module) -> str | None:
    """Return the name of the set that the layer has in place; None where it is the first, or the layer has no others:
    the statistics that it has outside of every ``use``."""
    membership: _Membership | None = layer.__dict__.get(_MEMBERSHIP)
    if membership is None or (active := membership.sets.active) == membership.sets.names[0]:
        return None
    return active


def in_set(layer: nn.Module, name: str | None) -> AbstractContextManager[Any]:
    """Return a context in which the layer has the set in place that `set_in_use` named."""
    membership: _Membership | None = layer.__dict__.get(_MEMBERSHIP)
    if membership is None or name == set_in_use(layer):
        return nullcontext()
    return membership.sets.use(membership.sets.names[0] if name is None else name)


class OtherSets:
    """Tells whether layers have another set in place than they had when this was made, or at the last `rest`.

    Args:
        layers: any; those without sets never have another one.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        found = (layer.__dict__.get(_MEMBERSHIP) for layer in layers)
        self._sets: list[Sets] = list({id(each.sets): each.sets for each in found if each is not None}.values())
        self.are_several = bool(self._sets)  # whether any of the layers has more than one set
        self.rest()

    def rest(self) -> None:
        """What is in place now is what the layers have where nobody uses another set."""
        self._at_rest = {id(sets): sets.active for sets in self._sets}

    def now(self) -> tuple[str, ...]:
        """Return the names of the sets in place."""
        return tuple([sets.active for sets in self._sets])

    def are_in_use(self) -> bool:
        """Whether any layer has another set."""
        return any(sets.active != self._at_rest[id(sets)] for sets in self._sets)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Have the set `name` in place in the block, wherever there is one."""
        with ExitStack() as stack:
            for sets in self._sets:
                if name in sets.names:
                    stack.enter_context(sets.use(name))
            yield

    def of(self, layer: nn.Module) -> str | None:
        """Return the name of the other set that `layer` has; None if it has none."""
        membership: _Membership | None = layer.__dict__.get(_MEMBERSHIP) if self._sets else None
        if membership is None:
            return None
        active = membership.sets.active
        return None if active == self._at_rest.get(id(membership.sets), active) else active
