"""`StatisticsSets`: a network with a set of running statistics for each distribution that it sees."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.choices import Choices, check_choices, is_chosen
from lightning_bn.discovery import find_batch_norms, unserved
from lightning_bn.layers.deferred import exchanging
from lightning_bn.modes import out_of_inference_mode
from lightning_bn.set_in_use import has_sets, join_sets
from lightning_bn.sets.part import SetPart
from lightning_bn.sets.places import are_held, has_tensors_of, places_of
from lightning_bn.sets.recomputation import Ran, guard_recomputation
from lightning_bn.torch_internals import in_backward


class StatisticsSets(nn.Module):
    """Several sets of running statistics for the batch-norm layers of one network, one of which is in place at a time.

    A set holds, for each layer, ``running_mean`` and ``running_var`` (of the variance that the layer's averaging
    keeps, torch's *unbiased within-batch* one by default), the count of batches and the averaging's history; with
    `affine` also a weight and a bias. The first set is what the model has: it is in place wherever no other is in use.

    Make it a part of the module that is trained, behind the network, so that it is saved, moved and optimised with it.

    Args:
        model: its batch-norm layers that keep running statistics, torch's, this package's or others', get the sets.
        names: of the sets, any strings, at least one. Each starts as a copy of what the model has now.
        affine: whether each set has an affine weight and bias of its own.
        layers: which of the layers; None for all.

    Raises:
        TypeError: names are not strings; `layers` is no choice.
        ValueError: no name, or one twice; no such layer; a layer that has sets already, or with `affine` a weight that
            is not a parameter.

    Example:
        >>> import torch
        >>> from lightning_bn import StatisticsSets
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> sets = StatisticsSets(model, ["day", "night"])
        >>> with sets.use("night"):
        ...     _ = model(torch.tensor([[20.0], [40.0]]))
        >>> model[0].running_mean, sets.state_dict("night")["0.running_mean"]
        (tensor([0.]), tensor([3.]))
    """

    __module__ = "lightning_bn"

    def __init__(
        self, model: nn.Module, names: Iterable[str], *, affine: bool = False, layers: Choices | None = None
    ) -> None:
        super().__init__()
        names = [names] if isinstance(names, str) else list(names)
        call = f"StatisticsSets(model, {names!r})"
        if not all(isinstance(name, str) for name in names):
            raise TypeError(
                f'{call}: a set is named by a string, as in StatisticsSets(model, ["clean", "adversarial"]).'
            )
        if not names or len(set(names)) < len(names):
            raise ValueError(f'{call}: at least one name, and none twice, as in ["clean", "adversarial"].')
        if layers is not None:
            check_choices(call, layers)
        found = [
            layer
            for layer in find_batch_norms(model)
            if layer.tracks and (layers is None or any(is_chosen(layers, name, layer.module) for name in layer.names))
        ]
        chosen = {layer.name: layer.module for layer in found}
        if not chosen:
            raise ValueError(
                f"{call}: {type(model).__name__} has no such batch-norm layer that keeps running statistics."
                + unserved(model, constant=True)
            )
        _check_free(call, chosen, affine=affine)
        self.affine = affine
        self.__dict__["_model"] = model  # of which this is a part, or next to it
        self._layers: dict[str, _BatchNorm] = chosen
        self._names = {layer.name: layer.names for layer in found}  # a layer may be at several places
        self._places = places_of(chosen.values(), model)
        self._gone: list[str] = []
        self._parts: dict[str, list[SetPart]] = {}
        self._active = self._at_rest = names[0]
        self._open: list[_Use] = []
        self._lock = threading.RLock()
        self._register(names[0])
        self._averagings = self._averagings_now()
        self.ran = Ran()
        for layer in chosen.values():
            join_sets(layer, self)
            guard_recomputation(layer)
        for name in names[1:]:
            self.add(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The sets, in their order; the first is in place outside of every `use`."""
        return tuple(self._parts)

    @property
    def active(self) -> str:
        """The set in place."""
        return self._active

    def use(self, name: str) -> _Use:
        """Return a context in which the set `name` is in place: forwards normalise with it in eval mode and move it in
        training mode, and whoever reads or writes the layers' statistics reads and writes it.

        Tensors are exchanged, and none is written. So sets may be used one after the other before a common backward,
        which then gives the gradients of separate networks. It nests, and what was in place before is again at exit,
        also after an exception. Several threads use the sets in turn: one waits until the other has left its outermost
        `use`. Where a set is used inside of a forward of the model, what the forward has run before is settled at once.

        Raises:
            KeyError: there is no such set.
        """
        self._check_known(name, f"sets.use({name!r})")
        return _Use(self, name)

    def add(self, name: str, like: str | None = None) -> None:
        """Add a set, as a copy of the set `like`, by default of the first one.

        With ``affine=True`` add sets before the optimizer is built, or give it the new parameters:
        ``optimizer.add_param_group({"params": list(sets.parameters_of(name))})``.

        Raises:
            KeyError: there is no set `like`.
            ValueError: there is a set `name`.
        """
        if not isinstance(name, str):
            raise TypeError(f"sets.add({name!r}): a set is named by a string.")
        if name in self._parts:
            raise ValueError(f"sets.add({name!r}): there is such a set; the names are {list(self.names)}.")
        like = self.names[0] if like is None else like
        self._check_known(like, f"sets.add({name!r}, like={like!r})")
        self._follow()
        with out_of_inference_mode():
            for new, old in zip(self._register(name), self._parts[like], strict=True):
                new.copy_from(old)

    def remove(self, name: str) -> None:
        """Remove a set, with its parameters.

        Raises:
            KeyError: there is no such set.
            ValueError: it is in place, or the first.
        """
        self._check_known(name, f"sets.remove({name!r})")
        if name in (self.names[0], self._active):
            why = "in use" if name == self._active != self.names[0] else "the first, which the model has outside of use"
            raise ValueError(f"sets.remove({name!r}): it is {why}, so it stays.")
        del self._parts[name], self._modules[_key(name)]

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """Return the affine weights and biases of a set; none without ``affine=True``.

        Raises:
            KeyError: there is no such set.
        """
        self._check_known(name, f"sets.parameters_of({name!r})")
        parts = self._parts[name]
        holders: list[nn.Module] = [part.layer if part.is_in_place else part for part in parts]
        found = [holder._parameters[each] for holder in holders for each in ("weight", "bias")] if self.affine else []
        return [parameter for parameter in found if parameter is not None]

    def state_dict(self, name: str | None = None, **options: Any) -> Any:
        """Return the ``state_dict`` of the model with the set `name` in place, which a plain model loads under
        ``strict=True``; without a name that of this module, which has every set.

        The way back is ``with sets.use(name): model.load_state_dict(state)``.

        Raises:
            KeyError: there is no such set.
        """
        if name is None:
            return super().state_dict(**options)
        model: nn.Module = self.__dict__["_model"]
        with self.use(name):
            state = model.state_dict(**options)
        # The sets may be a part of the model.
        own = tuple(f"{options.get('prefix', '')}{path}." for path, module in model.named_modules() if module is self)
        return {key: value for key, value in state.items() if not own or not key.startswith(own)}

    def waiting(self, layer: nn.Module) -> dict[str, nn.Module]:
        """Return, by the name of each set that is not in place, what holds the layer's tensors in it, under the names
        that they have in the layer: running statistics, and weight and bias with ``affine=True``."""
        at = [place for place, own in enumerate(self._layers.values()) if own is layer]
        parts = {name: parts[place] for name, parts in self._parts.items() for place in at}
        return {name: part for name, part in parts.items() if not part.is_in_place}

    def extra_repr(self) -> str:
        return f"{', '.join(map(repr, self.names))}" + ", affine=True" * self.affine

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()}, {len(self._layers)} layers)"

    def _register(self, name: str) -> list[SetPart]:
        """Make the parts of a set, below modules that are named as those of the model are."""
        root = nn.Module()
        parts = []
        for path, layer in self._layers.items():
            part = SetPart(layer, affine=self.affine)
            parts.append(part)
            if not path:  # the model is the layer
                root = part
                continue
            *above, last = path.split(".")
            place = root
            for each in above:
                place = place._modules.setdefault(each, nn.Module())  # type: ignore[assignment]
            place._modules[last] = part
        self._modules[_key(name)] = root
        self._parts[name] = parts
        return parts

    def _check_known(self, name: str, call: str) -> None:
        if name not in self._parts:
            raise KeyError(f"{call}: there is no such set; the names are {list(self.names)}.")

    def _averagings_now(self) -> list[nn.Module | None]:
        return [layer._modules.get("averaging") for layer in self._layers.values()]

    def _follow(self) -> None:
        """Let every set follow layers that were converted since, or that others stand in for with the same tensors, as
        ``SyncBatchNorm.convert_sync_batchnorm`` leaves them."""
        if self._gone or not are_held(self._places):
            self._find_layers()
        now = self._averagings_now()
        if any(one is not other for one, other in zip(now, self._averagings, strict=True)):
            with out_of_inference_mode():
                for part in (part for parts in self._parts.values() for part in parts):
                    part.average_as_layer()
            self._averagings = now

    def _find_layers(self) -> None:
        model: nn.Module = self.__dict__["_model"]
        found = find_batch_norms(model)
        there = {name: layer.module for layer in found for name in layer.names}
        numbers = {layer.module: len(layer.names) for layer in found}
        self._gone = []
        for place, (path, layer) in enumerate(self._layers.items()):
            names = self._names[path]
            if numbers.get(layer, 0) >= len(names):
                continue
            new = there.get(path)
            if new is None or any(there.get(name) is not new for name in names) or not has_tensors_of(new, layer):
                self._gone.append(path or "the model")
                continue
            self._layers[path] = new
            for parts in self._parts.values():
                parts[place].__dict__["_layer"] = new
            join_sets(new, self)
            guard_recomputation(new)
        self._places = places_of(numbers.keys() & self._layers.values(), model)

    def _put_in(self, name: str) -> None:
        """Have the set in place, whatever is now; nothing is changed where a layer can't take it."""
        if name == self._active:
            return
        self._follow()
        if self._gone:
            raise RuntimeError(
                f"StatisticsSets: {', '.join(self._gone[:3])} has been replaced or taken out since the sets were made, "
                "so its statistics can't be exchanged. Replace or fuse layers before StatisticsSets(model, names); to "
                "serve one set by itself, load sets.state_dict(name) into a plain model first."
            )
        for part in self._parts[name]:
            part.check()
        exchanging(self._layers.values(), lambda: self._exchange(name))

    def _exchange(self, name: str) -> None:
        for place, (own, present) in enumerate(zip(self._parts[name], self._parts[self._active], strict=True)):
            if own.is_in_place:  # an interrupt may have left some layers exchanged, and others not
                continue
            if not present.is_in_place:
                present = next(parts[place] for parts in self._parts.values() if parts[place].is_in_place)
            own.put_in(present)
        self._active = name
        self._averagings = self._averagings_now()

    def _save_to_state_dict(self, *args: Any) -> None:
        self._follow()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._follow()
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> StatisticsSets:
        self._follow()  # a layer with an averaging keeps its statistics in float32
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_open": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__["_lock"] = threading.RLock()
        for layer in self._layers.values():
            join_sets(layer, self)


class _Use:
    """One `StatisticsSets.use`. What is in place after an exit is the set of the newest that is still open, whichever
    was entered first: one in a generator may be left later than one that was entered after it."""

    def __init__(self, sets: StatisticsSets, name: str) -> None:
        self._sets, self._name = sets, name
        self._locks = False

    def __enter__(self) -> StatisticsSets:
        sets = self._sets
        # A recomputation may run in a thread of autograd's, while the one that has the lock waits for it.
        locks = not in_backward()
        if locks:
            sets._lock.acquire()
        before = sets._active
        try:
            sets._put_in(self._name)
        except BaseException:
            sets._exchange(before)
            if locks:
                sets._lock.release()
            raise
        if not sets._open:
            sets._at_rest = before
        sets._open.append(self)
        self._locks = locks
        sets.ran.uses_in_backward += not locks
        return sets

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        sets = self._sets
        try:
            sets._open.remove(self)
            sets._put_in(sets._open[-1]._name if sets._open else sets._at_rest)
        finally:
            if self._locks:
                sets._lock.release()
            else:
                sets.ran.uses_in_backward -= 1


def _check_free(call: str, layers: Mapping[str, _BatchNorm], *, affine: bool) -> None:
    taken = [name or "the model" for name, layer in layers.items() if has_sets(layer)]
    if taken:
        raise ValueError(
            f"{call}: {', '.join(taken[:3])} has sets already. Add to those, sets.add(name), or choose other layers: "
            "StatisticsSets(model, names, layers=...)."
        )
    if not affine:
        return
    derived = [
        name
        for name, layer in layers.items()
        if any(getattr(layer, each, None) is not None and each not in layer._parameters for each in ("weight", "bias"))
    ]
    if derived:
        raise ValueError(
            f"{call[:-1]}, affine=True): the weight of {', '.join(derived[:3])} is pruned or parametrized and not a "
            "parameter of the layer. Use affine=False, or leave such layers out with layers=...."
        )


def _key(name: str) -> str:
    """Return the name of a set as that of a module, which has no dots and is no attribute of one."""
    return "set=" + name.replace("%", "%25").replace(".", "%2E")
