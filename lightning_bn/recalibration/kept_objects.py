"""A model that stays as it is, whatever is run on it meanwhile."""

from __future__ import annotations

import enum
import gc
import io
import logging
import queue
import sys
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, compress, filterfalse, repeat
from multiprocessing.shared_memory import SharedMemory
from operator import is_, not_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

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
    with _no_garbage_collected():
        objects = _Objects(roots.values())
    if any(map(is_lazy, objects.tensors)):
        for module in modules:
            _refuse_lazy(module)
    tensors = KeptTensors()

    def restore() -> None:
        objects.restore()
        tensors.restore()

    try:
        with _no_garbage_collected():
            tensors.exchange(objects.tensors, objects.arrays)
        yield tensors
    finally:
        completely(restore)


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Let Python not look for garbage inside, where thousands of objects are made and none is dropped: it would walk
    all that the process holds, the more often the larger the model."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _refuse_lazy(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
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
        self.tensors: list[Tensor] = []
        self.arrays: list[int] = []
        self._undo: list[Callable[[], None]] = []
        self._empty: list[Any] = []
        self._seen: dict[int, object] = {}
        self._waiting: list[Any] = list(roots)
        while self._waiting:
            thing = self._waiting.pop()
            if id(thing) not in self._seen:
                self._seen[id(thing)] = thing
                self._visit(thing)

    def restore(self) -> None:
        """Put everything back."""
        for members in filter(None, self._empty):
            members.clear()
        for undo in self._undo:
            undo()

    def _visit(self, thing: Any) -> None:
        if type(thing) is tuple:  # the most frequent: sizes of kernels, strides
            self._later(thing)
        elif isinstance(thing, Tensor):
            if not is_transient(thing):
                self.tensors.append(thing)
            if thing.is_leaf and thing.grad is not None:
                self._waiting.append(thing.grad)
        elif isinstance(thing, nn.Module):
            self._visit_module(thing)
        elif isinstance(thing, (dict, list, deque, set, tuple, frozenset)):
            self._visit_container(thing)
        elif is_generator(thing):
            self._undo.append(generator_keeper(thing))
        elif _is_array(thing):
            self.arrays.append(thing.__array_interface__["data"][0])
            self._undo.append(partial(_restore_array, thing, thing.copy()))
        elif not _is_left_alone(type(thing)):
            self._visit_attributes(thing)

    def _later(self, values: Iterable[Any]) -> None:
        # In C: a module has some fifty of them.
        values = list(values)
        self._waiting += compress(values, map(not_, map(_CONSTANTS.__contains__, map(type, values))))

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
            self._later((*module.parameters(), *module.buffers()))
            return
        others = dict(attributes)
        own = list(map(others.pop, _OWN, repeat(None)))
        self._later(others.values())
        self._later(chain.from_iterable(members.values() for members in own[:3] if members))
        self._empty += filterfalse(None, own)
        self._undo += [partial(_restore_dict, members, dict(members)) for members in filter(None, own)]

    def _visit_container(self, thing: Any) -> None:
        if isinstance(thing, dict):
            self._undo.append(partial(_restore_dict, thing, dict(thing)))
            self._later(thing.values())
        else:
            if isinstance(thing, (list, deque)):
                self._undo.append(partial(_restore_list, thing, list(thing)))
            elif isinstance(thing, set):
                self._undo.append(partial(_restore_set, thing, set(thing)))
            self._later(thing)
        if type(thing).__module__ != "builtins":
            self._visit_attributes(thing)

    def _visit_attributes(self, thing: Any) -> None:
        own = getattr(thing, "__dict__", None)
        if own and not any(isinstance(value, _SHARED) for value in own.values() if type(value) not in _CONSTANTS):
            self._undo.append(partial(_restore_dict, own, dict(own)))
            self._later(own.values())


class _Sources(_Objects):
    """The state of what batches come from, without the data.

    Attributes:
        shared: whether any of it is in memory that processes share.
    """

    shared = False

    def _later(self, values: Iterable[Any]) -> None:
        values = list(values)
        super()._later(values)
        # Of what a function closes over generators alone: the rest may be the model, whose new statistics stay.
        cells = [cell for each in values if isinstance(each, types.FunctionType) for cell in each.__closure__ or ()]
        super()._later(filter(is_generator, map(_content, cells)))

    def _visit(self, thing: Any) -> None:
        if isinstance(thing, SharedMemory):
            self.shared = True
        elif isinstance(thing, Tensor):
            if thing.numel() <= _DATA:
                self._undo.append(partial(_restore_tensor, thing, thing.detach().clone()))
        elif isinstance(thing, DataLoader):
            # A copy of it is iterated; these are what the two share.
            self._later((thing.dataset, thing.sampler, thing.batch_sampler, thing.collate_fn, thing.generator))
        elif isinstance(thing, (Dataset, Sampler)):
            self._visit_attributes(thing)
        elif not (isinstance(thing, (dict, list, deque, set, tuple, frozenset)) and len(thing) > _DATA) and not (
            _is_array(thing) and thing.size > _DATA
        ):
            super()._visit(thing)


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
    if (
        len(members) == len(before)
        and all(map(is_, members.values(), before.values()))
        and all(map(is_, members, before))
    ):
        return
    if type(members) is dict:
        members.clear()
        members.update(before)
        return
    # A subclass may have a say in what is set, and must not here; but an ordered one keeps its order beside what a
    # plain one holds.
    kind = OrderedDict if isinstance(members, OrderedDict) else dict
    kind.clear(members)
    for key, value in before.items():
        kind.__setitem__(members, key, value)


def _restore_list(members: Any, before: list[Any]) -> None:
    if len(members) != len(before) or not all(map(is_, members, before)):
        members.clear()
        members.extend(before)


def _restore_set(members: set[Any], before: set[Any]) -> None:
    members.clear()
    members.update(before)


def _restore_tensor(tensor: Tensor, before: Tensor) -> None:
    if not torch.equal(tensor, before):
        tensor.data.copy_(before)


def _restore_array(array: Any, before: Any) -> None:
    if array.tobytes() != before.tobytes():
        array[...] = before
