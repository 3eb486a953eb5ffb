"""Where the values of tensors lie, who reads them, and whether compiled code calls: of that torch makes little public.

Each function says why nothing public will do, and what it answers where the private part is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

_PLACEHOLDER = 8  # bytes

_lazy_clone = getattr(torch, "_lazy_clone", None)
_is_cow_tensor = getattr(torch._C, "_is_cow_tensor", None)
_DispatchMode = getattr(getattr(torch.utils, "_python_dispatch", None), "TorchDispatchMode", None)
_weak_reference = getattr(torch.UntypedStorage, "_weak_ref", None)
_free_weak_reference = getattr(torch.UntypedStorage, "_free_weak_ref", None)
if None in (_weak_reference, getattr(torch._C, "_data_address", None)):
    _lazy_clone = None  # with which the others belong

address: Callable[[Tensor], int] = getattr(torch._C, "_data_address", Tensor.data_ptr)
"""Where the values of a tensor begin. The public ``data_ptr()`` counts as a write, and has a lazy copy made."""


def lazy_copy(tensor: Tensor) -> Tensor | None:
    """Return a tensor like `tensor`, over a copy of its whole storage that torch makes when either is first written.

    Whichever is written first gets new memory, and the other stays. `torch._lazy_clone` is what torch's own
    ``reshape`` and compiler are to use, and has no public name; without it a copy of everything must be made at once.

    Returns:
        None where the function is gone, for memory that is not torch's alone (shared between processes, an array of
        numpy's, a file), and for storages of one number or none. These may be placeholders that a first batch resizes,
        as observers of a quantisation have; torch fails where a lazy copy is resized and then written.
    """
    if _lazy_clone is None or tensor.untyped_storage().nbytes() <= _PLACEHOLDER:
        return None
    try:
        copy: Tensor = _lazy_clone(tensor)
    except (RuntimeError, NotImplementedError):
        return None
    return copy


def is_lazy(tensor: Tensor) -> bool:
    """Tell whether `tensor` lies in memory that it may share with a `lazy_copy`."""
    return _is_cow_tensor is not None and bool(_is_cow_tensor(tensor))


class StorageReference:
    """A reference to a storage that does not keep it alive.

    Python's own weak references are to the Python object, which comes and goes.
    """

    __slots__ = ("_pointer",)

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._pointer = storage._weak_ref()

    def __del__(self, free: Any = _free_weak_reference) -> None:
        if (pointer := getattr(self, "_pointer", None)) is not None:  # an interrupt may come before there is one
            free(pointer)

    def storage(self) -> torch.UntypedStorage | None:
        """Return the storage; None where nobody holds it any more."""
        return torch.UntypedStorage._new_with_weak_ptr(self._pointer)


def watched(before: Callable[[Tensor], None], after: Callable[[Tensor], None]) -> AbstractContextManager[Any] | None:
    """Return a context in which `before` is called with each tensor that an operation gets and `after` with each that
    it returns, below autograd and autocast.

    `TorchDispatchMode` is described by torch's developers and lies in a private module; None where it is gone.
    """
    if _DispatchMode is None:
        return None

    class Watching(_DispatchMode):  # type: ignore[misc, valid-type]
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # nothing is compiled inside, and torch would put two functions around each operation

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            _each_tensor(args, before)
            if kwargs:
                _each_tensor(kwargs.values(), before)
            result = function(*args, **(kwargs or {}))
            _each_tensor((result,), after)
            return result

    return Watching()


def _each_tensor(values: Iterable[Any], call: Callable[[Tensor], None]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            if value.layout is torch.strided:
                call(value)
        elif isinstance(value, (list, tuple)):
            _each_tensor(value, call)


def in_compiled_call() -> bool:
    """Tell whether torch's wrapper around compiled code is being executed, and keeps state on a stack meanwhile, as
    torch 2.14 does; where it has no such stack, or calls the wrapper otherwise, the answer is False."""
    frame = sys._getframe(1) if hasattr(torch._C, "_dynamo_save_local_dispatch_key_set") else None
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        frame = frame.f_back
    return frame is not None
