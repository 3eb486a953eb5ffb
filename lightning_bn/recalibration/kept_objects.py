"""What hangs in the attributes of a model, found and kept, and put back in place."""

from __future__ import annotations

import copy
import enum
import io
import logging
import pathlib
import queue
import re
import sys
import threading
import types
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.hooks import RemovableHandle

from lightning_bn.recalibration.kept_tensors import KeptTensors
from lightning_bn.recalibration.random_states import generator_keeper, is_generator
from lightning_bn.sharding import is_fsdp1, is_transient

__all__ = ["KeptObjects", "Weights", "kept"]

_Undo = Callable[[], None]

# What has no state of its own, or one that only its maker changes.
_ATOMS: set[type] = {
    *(type(None), bool, int, float, complex, str, bytes, type, range, slice, type(...), type(NotImplemented)),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.CodeType, types.MappingProxyType),
    *(
        weakref.ReferenceType,
        weakref.ProxyType,
        weakref.CallableProxyType,
        weakref.WeakMethod,
        re.Pattern,
        RemovableHandle,
    ),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
}
_ATOMIC_BASES = (type, enum.Enum, pathlib.PurePath)
# What several threads share, what leads out of the process, and data: none of it is a model's state.
_LOCKS = (
    type(threading.Lock()),
    type(threading.RLock()),
    threading.Condition,
    threading.Event,
    threading.Semaphore,
    threading.Thread,
)
_OUTSIDE = (*_LOCKS, queue.Queue, logging.Logger, logging.Handler, io.IOBase, DataLoader, Dataset)
# What runs a model (a Trainer, a logger) hangs in its attributes too, and is no part of it.
_FRAMEWORKS = {"lightning", "pytorch_lightning", "lightning_fabric"}
# The dictionaries of a module whose values torch calls or reads by themselves: which are there is kept, and not what
# they are.
_HOOKS = frozenset(name for name in vars(nn.Module()) if "hook" in name)


class Weights:
    """The parameters of a model, given their values back between two batches."""

    def __init__(self, parameters: KeptTensors) -> None:
        self._parameters = parameters
        self._batches = 0

    def batch_is_done(self) -> None:
        """Undo what the batch wrote into parameters, so that the next one meets the weights as they are."""
        if not self._batches:
            # An average of weights is often written where no version counter sees it: whoever does so does it in the
            # first batch.
            self._parameters.find_silent_writes()
        self._parameters.restore_written()
        self._batches += 1


@contextmanager
def kept(**roots: object) -> Iterator[Weights]:
    """Put all back at exit that is written inside into `roots` and what hangs in them: values of tensors bit for bit,
    in place.

    Parameters and their gradients, buffers, which of them there are, modes, hooks, plain attributes, lists, dicts,
    metrics at any depth: see `KeptObjects` and `KeptTensors`. It takes the memory of a copy of all tensors. Not the
    values of parameters that FSDP 1 or DeepSpeed's stage 3 lends for a forward: these forget what is written into them.

    Args:
        **roots: modules, optimizers, batches; named as an error is to name them.

    Raises:
        TypeError: something that can't be put back, by name; before anything is done.
    """
    for root in roots.values():
        if isinstance(root, nn.Module):
            list(
                root.buffers()
            )  # those that are on their way from other ranks arrive, and the module has its own again
    objects = KeptObjects(roots)
    own = [parameter for parameter in objects.parameters if not is_transient(parameter)]
    parameters, tensors = KeptTensors(own), KeptTensors(objects.tensors)
    try:
        objects.exchange()
        yield Weights(parameters)
    finally:
        objects.restore()
        parameters.restore()
        tensors.restore()


class KeptObjects:
    """The state of objects and of all that hangs in them, but for the values of tensors.

    Modules, attributes, lists, dicts, sets, deques, numpy arrays, generators of random numbers, at any depth; each is
    put back in place, so that whoever else holds it sees it too. What else has a state, and can be copied, is exchanged
    for a copy meanwhile.

    Left alone: functions and what they close over, weak references, locks and whatever holds one, loggers, open files,
    loaders, datasets, Lightning's own objects that are no modules, and what a library written in C hands out and can't
    copy, such as a process group.

    Args:
        roots: objects by the name a user knows them by.
    Attributes:
        parameters, tensors: all that were found.

    Raises:
        TypeError: something can't be put back; it is named.
    """

    def __init__(self, roots: dict[str, object]) -> None:
        self.parameters: list[Tensor] = []
        self.tensors: list[Tensor] = []
        self._undo: list[_Undo] = []
        self._empty: list[Any] = []
        self._exchange: list[_Undo] = []
        self._seen: dict[int, object] = {}
        self._waiting: list[tuple[str, object, Any]] = [(name, root, None) for name, root in roots.items()]
        while self._waiting:
            self._visit(*self._waiting.pop())

    def exchange(self) -> None:
        """Put copies in the place of what can only be kept so."""
        for each in self._exchange:
            each()

    def restore(self) -> None:
        """Put everything back."""
        for members in self._empty:
            if members:
                members.clear()
        for undo in self._undo:
            undo()

    def _visit(self, name: str, thing: Any, holder: Any) -> None:
        kind = type(thing)
        if kind in _ATOMS or id(thing) in self._seen:
            return
        self._seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            self._visit_tensor(name, thing)
        elif isinstance(thing, nn.Module):
            self._visit_module(name, thing)
        elif not self._visit_container(name, thing) and not _is_left_alone(kind):
            self._visit_object(name, thing, holder)

    def _visit_tensor(self, name: str, tensor: Tensor) -> None:
        if nn.parameter.is_lazy(tensor):
            raise TypeError(
                f"recalibrate(model, batches): {name} is lazy and has no values yet. Run a batch through the model "
                f"first."
            )
        (self.parameters if isinstance(tensor, nn.Parameter) else self.tensors).append(tensor)
        if tensor.is_leaf and tensor.grad is not None:
            self._later(f"{name}.grad", tensor.grad, None)

    def _visit_module(self, name: str, module: nn.Module) -> None:
        attributes = vars(module)
        if is_fsdp1(module):  # what it notes of its parameters must agree with them
            attributes = {key: attributes[key] for key in ("_modules", *_HOOKS)}
            self._undo.append(partial(setattr, module, "training", module.training))
        else:
            self._undo.append(partial(_restore_dict, attributes, dict(attributes)))
        if isinstance(module, torch.jit.ScriptModule):
            # Its attributes lie in C++; its training flag goes by the module's own setter.
            self._undo.append(partial(setattr, module, "training", module.training))
            self.parameters += module.parameters()
            self.tensors += module.buffers()
            return
        for key, value in attributes.items():
            if _is_constant(value):
                continue
            if key in _HOOKS:
                if value:
                    self._keep_members(value)
                else:
                    self._empty.append(value)
            elif key in ("_parameters", "_buffers", "_modules"):
                self._undo.append(partial(_restore_dict, value, dict(value)))
                for child, part in value.items():
                    if part is not None:
                        self._later(f"{name}.{child}", part, value)
            else:
                self._later(f"{name}.{key}", value, attributes)

    def _keep_members(self, members: Any) -> None:
        if isinstance(members, dict):
            self._undo.append(partial(_restore_dict, members, dict(members)))
        elif isinstance(members, set):
            self._undo.append(partial(_restore_set, members, set(members)))

    def _visit_container(self, name: str, thing: Any) -> bool:
        """Keep what Python's own containers hold, and subclasses of them; tell whether it was one."""
        if isinstance(thing, dict):
            self._undo.append(partial(_restore_dict, thing, dict(thing)))
            for key, value in thing.items():
                self._later(f"{name}[{key!r:.40}]", value, thing)
                self._later(f"a key of {name}", key, None)
        elif isinstance(thing, (list, deque)):
            self._undo.append(partial(_restore_list, thing, list(thing)))
            for place, value in enumerate(thing):
                self._later(f"{name}[{place}]", value, thing)
        elif isinstance(thing, (tuple, set, frozenset)):
            self._keep_members(thing)
            for place, value in enumerate(thing):
                self._later(f"{name}[{place}]", value, None)
        elif isinstance(thing, bytearray):
            self._undo.append(partial(thing.__setitem__, slice(None), bytes(thing)))
        else:
            return False
        if type(thing).__module__ != "builtins" and hasattr(thing, "__dict__"):
            self._keep_attributes(name, thing)
        return True

    def _visit_object(self, name: str, thing: Any, holder: Any) -> None:
        if is_generator(thing):
            self._undo.append(generator_keeper(thing))
        elif _is_array(thing):
            self._undo.append(partial(_restore_array, thing, thing.copy()))
        elif isinstance(thing, types.MethodType):
            self._later(f"{name}.__self__", thing.__self__, None)
        elif isinstance(thing, partial):
            for part in (thing.func, thing.args, thing.keywords):
                self._later(name, part, None)
        elif isinstance(thing, (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)):
            raise TypeError(_cant_be_kept(name, thing))
        elif _has_attributes(thing):
            self._keep_attributes(name, thing)
        else:
            self._keep_by_a_copy(name, thing, holder)

    def _keep_attributes(self, name: str, thing: Any) -> None:
        """Keep the attributes of an object of a class written in Python."""
        own = getattr(thing, "__dict__", {})
        if any(isinstance(value, _LOCKS) for value in own.values() if type(value) not in _ATOMS):
            return
        if own:
            self._undo.append(partial(_restore_dict, own, dict(own)))
        for key, value in own.items():
            self._later(f"{name}.{key}", value, own)
        for slot in _slots(type(thing)):
            value = getattr(thing, slot, _NOTHING)
            self._undo.append(partial(_restore_slot, thing, slot, value))
            self._later(f"{name}.{slot}", value, None)

    def _keep_by_a_copy(self, name: str, thing: Any, holder: Any) -> None:
        """Let the pass work on a copy: the holder's own restoring puts the thing itself back."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.14 copies no iterator of itertools
                twin = copy.deepcopy(thing)
        except Exception as error:  # anybody's __deepcopy__ may raise anything
            if type(thing).__flags__ & _HEAP_TYPE and not isinstance(thing, Iterator):
                return
            raise TypeError(_cant_be_kept(name, thing)) from error
        if twin is thing:
            return
        if holder is None:
            raise TypeError(_cant_be_kept(name, thing))
        self._exchange.append(partial(_put_in_place, holder, thing, twin))

    def _later(self, name: str, value: object, holder: Any) -> None:
        if not _is_constant(value):
            self._waiting.append((name, value, holder))


_NOTHING = type("Nothing", (), {})  # stands for an attribute that is not there
_HEAP_TYPE = 1 << 9  # of classes made at run time: by class statements, and by C libraries for what they hand out


def _is_constant(value: Any) -> bool:
    """Whether nothing can change in `value`; of the attributes of a network's modules, most are so."""
    kind = type(value)
    return kind in _ATOMS or (kind is tuple and all(type(each) in _ATOMS for each in value))


def _is_left_alone(kind: type) -> bool:
    if issubclass(kind, (*_ATOMIC_BASES, *_OUTSIDE)):
        return True
    return any(base.__module__.partition(".")[0] in _FRAMEWORKS for base in kind.__mro__)


def _cant_be_kept(name: str, thing: object) -> str:
    return (
        f"recalibrate(model, batches): {name} is a {type(thing).__name__}, which could not be put back after the pass. "
        "Keep it outside the model, or keep in its place what it is made from (a loader, not its iterator)."
    )


def _has_attributes(thing: object) -> bool:
    """Whether it is of a class written in Python, whose instances hold what they have in attributes."""
    return hasattr(thing, "__dict__") or any("__slots__" in vars(base) for base in type(thing).__mro__)


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in ("__dict__", "__weakref__"):
                yield (
                    f"_{base.__name__.lstrip('_')}{slot}" if slot.startswith("__") and not slot.endswith("__") else slot
                )


def _is_array(thing: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(thing, numpy.ndarray)


def _restore_dict(members: dict[Any, Any], before: dict[Any, Any]) -> None:
    if (
        len(members) == len(before)
        and all(map(is_, members.values(), before.values()))
        and all(map(is_, members, before))
    ):
        return
    # A subclass may have a say in what is set, and must not here; but an ordered one keeps its order beside what a
    # plain one holds.
    kind = OrderedDict if isinstance(members, OrderedDict) else dict
    kind.clear(members)
    for key, value in before.items():
        kind.__setitem__(members, key, value)


def _restore_list(members: Any, before: list[Any]) -> None:
    if len(members) == len(before) and all(map(is_, members, before)):
        return
    members.clear()
    members.extend(before)


def _restore_set(members: set[Any], before: set[Any]) -> None:
    members.clear()
    members.update(before)


def _restore_array(array: Any, before: Any) -> None:
    if array.tobytes() != before.tobytes():
        array[...] = before


def _restore_slot(thing: Any, slot: str, before: Any) -> None:
    if before is not _NOTHING:
        object.__setattr__(thing, slot, before)
    elif hasattr(thing, slot):
        object.__delattr__(thing, slot)


def _put_in_place(holder: Any, thing: object, twin: object) -> None:
    places = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for place in [place for place, value in places if value is thing]:
        holder[place] = twin
