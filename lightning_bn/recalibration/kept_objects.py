"""A model that stays as it is, whatever is run on it meanwhile."""

from __future__ import annotations

import enum
import io
import logging
import queue
import sys
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, compress, filterfalse, repeat
from multiprocessing.shared_memory import SharedMemory
from operator import is_, is_not, not_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from lightning_bn.modes import no_garbage_collected
from lightning_bn.recalibration.kept_tensors import KeptTensors
from lightning_bn.recalibration.random_states import generator_keeper, is_generator
from lightning_bn.recalibration.transaction import completely
from lightning_bn.sharding import is_fsdp1, is_transient
from lightning_bn.torch_internals import all_modules, buffers_of

# More members than this are data, and no state of what gives them.
_DATA = 1000

# What attributes hold most often, and can't change.
_CONSTANTS: set[type] = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size}
_CONSTANTS |= {types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, *weakref.ProxyTypes}
# What threads share: whatever holds one of them may be another thread's doing.
_SHARED = (
    *(type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Event, threading.Semaphore),
    threading.Thread,
)
# Classes, what leads out of the process, and data.
_LEFT_ALONE = (type, enum.Enum, *_SHARED, queue.Queue, logging.Logger, logging.Handler, io.IOBase, DataLoader, Dataset)
# What runs a model (a Trainer, a logger) hangs in its attributes too, and is no part of it.
_FRAMEWORKS = {"lightning", "pytorch_lightning", "lightning_fabric"}
# The dictionaries of a module whose values torch calls or reads by themselves: which are there is kept, and not what
# they are.
_HOOKS = frozenset(name for name in vars(nn.Module()) if "hook" in name)
_OWN = ("_parameters", "_buffers", "_modules", *_HOOKS)
_CONTAINERS = (dict, list, deque, set, tuple, frozenset)


@contextmanager
def kept(**roots: object) -> Iterator[KeptTensors]:
    """Restore at exit what is written inside into `roots` and what they hold: values of tensors bit for bit, in place.

    Kept are parameters and their gradients, buffers, which of them there are, modes, hooks, attributes, and in these
    at any depth: modules, metrics, objects of classes written in Python, lists, dicts, sets, deques, arrays of numpy,
    generators of random numbers. Each is restored in place, so that whoever else holds it sees it too.

    Left alone: functions and what they close over, iterators, attributes in slots, objects of classes written in C
    (an array of Python's, a process group), locks and whatever holds one, loggers, open files, loaders, datasets,
    Lightning's own objects that are no modules, and parameters that FSDP 1 or DeepSpeed's stage 3 lends for a forward:
    these forget what is written into them.

    What nobody writes takes no memory, see `KeptTensors`.

    Args:
        **roots: modules, optimizers, batches.

    Raises:
        TypeError: a parameter that is lazy; before anything is done.
    """
    modules = [root for root in roots.values() if isinstance(root, nn.Module)]
    for each in chain.from_iterable(map(all_modules, modules)):
        buffers_of(each).values()  # those that are on their way from other ranks arrive, and the module has its own
    with no_garbage_collected():
        objects = _Objects(roots.values())
    if not {UninitializedBuffer, UninitializedParameter}.isdisjoint(map(type, objects.tensors)):
        for module in modules:
            _refuse_lazy(module)
    tensors = KeptTensors()

    def restore() -> None:
        objects.restore()
        tensors.restore()

    try:
        with no_garbage_collected():
            tensors.exchange(objects.tensors, objects.arrays)
        yield tensors
    finally:
        completely(restore)


def _refuse_lazy(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise TypeError(
                f"recalibrate(model, batches): model.{name} is lazy and has no values yet. Run a batch through the "
                f"model first."
            )


class _Objects:
    """The state of objects and of all that they hold, but for the values of tensors.

    Attributes:
        tensors: all that were found, but for lent parameters.
        arrays: where the memory of each array of numpy's begins.
    """

    def __init__(self, roots: Iterable[object]) -> None:
        self.arrays: list[int] = []
        self._tensors: list[Tensor] = []
        self._undo: list[Callable[[], None]] = []
        self._empty: list[Any] = []
        self._waiting = list(roots)
        self._visits: dict[type, Callable[[Any], None]] = {}
        seen: dict[int, object] = {}
        while self._waiting:
            things = self._variable(self._waiting)
            new = dict(zip(map(id, things), things, strict=True))
            for known in new.keys() & seen.keys():
                del new[known]
            seen |= new
            self._waiting = []
            for thing in new.values():
                kind = type(thing)
                if kind is tuple:  # the most frequent: sizes of kernels, strides
                    self._waiting += thing
                    continue
                if kind not in self._visits:
                    self._visits[kind] = self._visit_of(thing, kind)
                self._visits[kind](thing)
        # Those that FSDP 1 or DeepSpeed lends have attributes, as most have none.
        self.tensors = list(filterfalse(vars, self._tensors))
        self.tensors += [each for each in filter(vars, self._tensors) if not is_transient(each)]

    def restore(self) -> None:
        """Put everything back."""
        for members in filter(None, self._empty):
            members.clear()
        for undo in self._undo:
            undo()

    def _variable(self, things: list[Any]) -> list[Any]:
        """Leave out what can't change; in C, since a module has some fifty of them."""
        return list(compress(things, map(not_, map(_CONSTANTS.__contains__, map(type, things)))))

    def _visit_of(self, thing: Any, kind: type) -> Callable[[Any], None]:
        """Return how to visit things of the kind of this one."""
        if isinstance(thing, Tensor):
            return self._visit_tensor
        if isinstance(thing, nn.Module):
            return self._visit_module
        if isinstance(thing, _CONTAINERS):
            return self._visit_container
        if is_generator(thing):
            return lambda generator: self._undo.append(generator_keeper(generator))
        if _is_array(thing):
            return self._visit_array
        return _leave_alone if _is_left_alone(kind) else self._visit_attributes

    def _visit_tensor(self, tensor: Tensor) -> None:
        self._tensors.append(tensor)
        if tensor.is_leaf and tensor.grad is not None:
            self._waiting.append(tensor.grad)

    def _visit_array(self, array: Any) -> None:
        self.arrays.append(array.__array_interface__["data"][0])
        self._undo.append(partial(_restore_array, array, array.copy()))

    def _visit_module(self, module: nn.Module) -> None:
        attributes = vars(module)
        if is_fsdp1(module):  # what it notes of its parameters must agree with them
            attributes = {key: attributes[key] for key in ("_modules", *_HOOKS)}
            self._undo.append(partial(setattr, module, "training", module.training))
        else:
            self._undo.append(partial(_restore_dict, attributes, dict(attributes)))
        if isinstance(module, torch.jit.ScriptModule):
            # Its attributes lie in C++; its training flag goes by the module's own setter.
            self._undo.append(partial(setattr, module, "training", module.training))
            self._waiting += (*module.parameters(), *module.buffers())
            return
        others = dict(attributes)
        own = list(map(others.pop, _OWN, repeat(None)))
        self._waiting += others.values()
        self._waiting += chain.from_iterable(map(dict.values, filter(None, own[:3])))
        self._empty += filterfalse(None, own)
        self._undo += [partial(_restore_dict, members, dict(members)) for members in filter(None, own)]

    def _visit_container(self, thing: Any) -> None:
        if isinstance(thing, (tuple, frozenset)):
            self._waiting += thing
        elif not thing:
            self._empty.append(thing)
        elif isinstance(thing, dict):
            self._undo.append(partial(_restore_dict, thing, dict(thing)))
            self._waiting += thing.values()
        else:
            before = set(thing) if isinstance(thing, set) else list(thing)
            self._undo.append(partial(_restore_members, thing, before))
            self._waiting += thing
        if type(thing).__module__ != "builtins":
            self._visit_attributes(thing)

    def _visit_attributes(self, thing: Any) -> None:
        own = getattr(thing, "__dict__", None)
        if own and not any(isinstance(value, _SHARED) for value in own.values() if type(value) not in _CONSTANTS):
            self._undo.append(partial(_restore_dict, own, dict(own)))
            self._waiting += own.values()


def _leave_alone(thing: object) -> None:
    pass


class _Sources(_Objects):
    """The state of what batches come from, without the data.

    Attributes:
        shared: whether any of it is in memory that processes share.
    """

    shared = False

    def _variable(self, things: list[Any]) -> list[Any]:
        # Of what a function closes over generators alone: the rest may be the model, whose new statistics stay.
        cells = [cell for each in things if isinstance(each, types.FunctionType) for cell in each.__closure__ or ()]
        return [*super()._variable(things), *filter(is_generator, map(_content, cells))]

    def _visit_of(self, thing: Any, kind: type) -> Callable[[Any], None]:
        if isinstance(thing, SharedMemory):
            self.shared = True
        if isinstance(thing, DataLoader):
            return self._visit_loader
        if isinstance(thing, (Dataset, Sampler)):
            return self._visit_attributes
        return super()._visit_of(thing, kind)

    def _visit_loader(self, loader: DataLoader[Any]) -> None:
        # A copy of it is iterated; these are what the two share.
        self._waiting += (loader.dataset, loader.sampler, loader.batch_sampler, loader.collate_fn, loader.generator)

    def _visit_tensor(self, tensor: Tensor) -> None:
        if tensor.numel() <= _DATA:
            self._undo.append(partial(_restore_tensor, tensor, tensor.detach().clone()))

    def _visit_container(self, thing: Any) -> None:
        if len(thing) <= _DATA:
            super()._visit_container(thing)

    def _visit_array(self, array: Any) -> None:
        if array.size <= _DATA:
            super()._visit_array(array)


@contextmanager
def kept_sources(*sources: object) -> Iterator[None]:
    """Restore at exit the state of loaders, and of the datasets, samplers and transforms behind them: positions,
    counters, generators, in attributes at any depth, and generators in what functions among them close over.

    Data are left alone: tensors, arrays and containers of more than 1,000 members. So is what lives in a worker's
    process, which a second iterator does not share, and whatever `kept` leaves alone.
    """
    # One that shares memory is a loader of the pass's own, and its threads go on with the attributes that it has.
    objects = _Sources(each for each in sources if not keeps_position_in_shared_memory(each))
    try:
        yield
    finally:
        completely(objects.restore)


def keeps_position_in_shared_memory(loader: object) -> bool:
    """Whether `loader` reads an iterable dataset that holds memory which processes share: there is no second pass over
    it that the running one does not notice."""
    return isinstance(getattr(loader, "dataset", None), IterableDataset) and _Sources([loader]).shared


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None


def _is_left_alone(kind: type) -> bool:
    if issubclass(kind, _LEFT_ALONE):
        return True
    return any(base.__module__.partition(".")[0] in _FRAMEWORKS for base in kind.__mro__)


def _is_array(thing: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(thing, numpy.ndarray)


def _restore_dict(members: dict[Any, Any], before: dict[Any, Any]) -> None:
    # A subclass may have a say in what is set, and must not here; but an ordered one keeps its order beside what a
    # plain one holds.
    kind = OrderedDict if isinstance(members, OrderedDict) else dict
    changed: Iterable[Any] = before
    if len(members) != len(before) or not all(map(is_, members, before)):
        kind.clear(members)
    else:
        changed = compress(before, map(is_not, members.values(), before.values()))
    for key in changed:
        kind.__setitem__(members, key, before[key])


def _restore_members(members: Any, before: Collection[Any]) -> None:
    if len(members) != len(before) or not all(map(is_, members, before)):
        members.clear()
        getattr(members, "update" if isinstance(members, set) else "extend")(before)


def _restore_tensor(tensor: Tensor, before: Tensor) -> None:
    if not torch.equal(tensor, before):
        tensor.data.copy_(before)


def _restore_array(array: Any, before: Any) -> None:
    if array.tobytes() != before.tobytes():
        array[...] = before
