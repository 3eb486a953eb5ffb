"""Tensors that keep their values while third-party code runs, at no cost for those that nobody writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import chain, compress, count
from operator import attrgetter, is_not, ne

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_bn.modes import out_of_inference_mode
from lightning_bn.recalibration.storages import StorageReference, address, is_lazy, lazy_copy

# Memory that a storage has left; an array of numpy's may still look at it.
_left: list[Tensor] = []

_PLAIN = (Tensor, Parameter, torch.nn.Buffer)
_SHAPE, _IS_LEAF, _LEARNS, _GRADIENT = map(attrgetter, ("shape", "is_leaf", "requires_grad", "grad"))
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class KeptTensors:
    """Gives tensors other memory to work on, and their own memory back.

    The other memory is a lazy copy of each storage, which torch makes when somebody first writes into it: a write in
    place, through ``.data``, by a kernel that counts no version, or into an array of numpy's taken meanwhile. Tensors
    that share a storage share its copy. So nothing is compared, and what nobody writes takes no memory.

    Where there is no lazy copy (`lazy_copy` says when) a tensor is copied at once, and its value written back where the
    bits differ: subclasses, sparse and quantised tensors, tensors made in inference mode, and those whose memory one of
    numpy's arrays has too, which writes past torch.

    ``requires_grad`` and which tensor ``.grad`` is are kept too.
    """

    def __init__(self) -> None:
        self._storages: list[_Storage] = []
        self._copied: list[_Copied] = []
        self._watched: list[Tensor] = []  # parameters on lazy copies, with the memory that is their own
        self._unwritten: list[object] = []
        self._leaves: list[Tensor] = []
        self._learning: list[bool] = []
        self._gradients: list[Tensor | None] = []

    def exchange(self, tensors: Iterable[Tensor], arrays: Sequence[int] = ()) -> None:
        """Give `tensors`, each once, the memory to work on.

        Args:
            tensors: those to keep.
            arrays: where the memory of each of numpy's arrays that may be written begins.
        """
        tensors = list(tensors)
        self._leaves = list(filter(_IS_LEAF, tensors))
        self._learning, self._gradients = list(map(_LEARNS, self._leaves)), list(map(_GRADIENT, self._leaves))
        by_storage: dict[int, _Storage] = {}
        with out_of_inference_mode():
            for tensor in tensors:
                if tensor.is_meta:
                    continue
                if not _is_plain(tensor) or tensor.is_inference():
                    self._copied.append(_Copied(tensor))
                    continue
                memory = tensor.data
                untyped = memory.untyped_storage()
                if tensor.numel() and not untyped.nbytes():  # FSDP has freed it
                    continue
                if (storage := by_storage.get(untyped._cdata)) is None:
                    storage = by_storage[untyped._cdata] = _Storage(memory)
                storage.add(tensor, memory)
            for storage in by_storage.values():
                self._storages.append(storage)  # before, so that an interrupt finds it
                if (arrays and _holds_any(storage.members[0][1], arrays)) or not storage.exchange():
                    self._storages.pop()
                    self._copied += [_Copied(tensor) for tensor, _ in storage.members]
        with_parameters = [storage.members for storage in self._storages if storage.has_parameter]
        self._watched = [*chain.from_iterable(chain.from_iterable(with_parameters))]
        self._unwritten = self._places()

    def restore_parameters(self) -> None:
        """Undo what was written into parameters since `exchange`."""
        if self._places() != self._unwritten:  # as most never are: one comparison after each batch
            for storage in self._storages:
                if storage.has_parameter and storage.is_written():
                    storage.exchange()
            self._unwritten = self._places()
        for copied in self._copied:
            if isinstance(copied.tensor, Parameter):
                copied.restore()

    def _places(self) -> list[object]:
        """Return where the watched tensors are, and their shapes: a tensor that is written is elsewhere."""
        return [*map(address, self._watched), *map(_SHAPE, self._watched)]

    def restore(self) -> None:
        """Give every tensor back what it was."""
        # No block with another grad mode: an interrupt at its end would leave that mode behind.
        for storage in self._storages:
            storage.restore()
        for copied in self._copied:
            copied.restore()
        # Most are as they were, which takes no Python to find out.
        for place in compress(count(), map(ne, map(_LEARNS, self._leaves), self._learning)):
            self._leaves[place].requires_grad_(self._learning[place])
        for place in compress(count(), map(is_not, map(_GRADIENT, self._leaves), self._gradients)):
            self._leaves[place].grad = self._gradients[place]


class _Storage:
    """A storage whose tensors work on a lazy copy of it.

    Of two storages that share memory lazily, torch moves the one that is written to new memory. Here that is the copy;
    the storage itself stays where it is, for all who hold it.
    """

    __slots__ = ("_address", "_alone", "_copy", "_given", "has_parameter", "members", "original")

    def __init__(self, memory: Tensor) -> None:
        self.members: list[tuple[Tensor, Tensor]] = []
        """Each tensor over the storage, and the same memory as no parameter: that stays when other memory is put under
        the tensor."""
        self.has_parameter = False
        self._address = address(memory)
        self._alone = not is_lazy(memory)  # it may be the working copy of a block around this one
        # Copies are in attributes, and not in local variables, which the traceback of an interrupt would hold.
        self.original: Tensor | None = None
        """A lazy copy, like the first tensor, that nobody writes into."""
        self._copy: Tensor | None = None
        self._given: list[StorageReference] = []

    def add(self, tensor: Tensor, memory: Tensor) -> None:
        """Take in one more tensor over the storage."""
        self.members.append((tensor, memory))
        self.has_parameter |= type(tensor) is Parameter

    def exchange(self) -> bool:
        """Let the tensors work on a new copy; return whether there is one."""
        if self.original is None:
            self.original = lazy_copy(self.members[0][1])
        if self.original is None:
            return False
        self._copy = lazy_copy(self.original)
        if self._copy is None:
            raise RuntimeError("recalibrate(model, batches): torch made a lazy copy of a tensor, and now makes none.")
        self._given.append(StorageReference(self._copy.untyped_storage()))
        self.members[0][0].data = self._copy
        for tensor, memory in self.members[1:]:
            alike = torch.empty(0, dtype=memory.dtype, device=memory.device)
            place = (memory.storage_offset(), memory.shape, memory.stride())
            tensor.data = alike.set_(self._copy.untyped_storage(), *place)
        self._copy = None
        return True

    def is_written(self) -> bool:
        moved = self._address - address(self.members[0][1])  # other than 0 where others have written into the storage
        return any(
            address(tensor) != address(memory) + moved or tensor.shape != memory.shape
            for tensor, memory in self.members
        )

    def restore(self) -> None:
        for tensor, memory in self.members:
            tensor.data = memory
        memory = self.members[0][1]
        if self.original is not None and address(memory) != self._address:
            # Written through a tensor that is not among those that were found.
            memory.untyped_storage().copy_(self.original.untyped_storage())
            _left.append(self.original)
        self.original = self._copy = None
        while self._given:
            given = self._given.pop().storage()
            if given is not None:  # somebody holds it: now it gets memory of its own
                given.data_ptr()
        if self._alone:
            memory.data_ptr()  # it is alone again: being written does not move it


class _Copied:
    """A tensor that is written in place, and a copy of what it was."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._memory = tensor.data
        self._copy = self._memory.clone()

    def restore(self) -> None:
        tensor, memory = self.tensor, self._memory
        plain = _is_plain(tensor)
        # A nested tensor has no shape that it would tell.
        if not tensor.is_nested and (
            tensor.shape != memory.shape or (plain and tensor.data_ptr() != memory.data_ptr())
        ):
            tensor.data = memory
        if plain and any(stride == 0 and size > 1 for stride, size in zip(memory.stride(), memory.shape, strict=True)):
            return  # one value stands at many places: no write in place goes there
        if not plain or not _same_bits(memory, self._copy):  # of others nothing tells what their bits are
            with torch.inference_mode() if tensor.is_inference() else nullcontext():
                memory.copy_(self._copy)


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.is_nested)
    )


def _holds_any(memory: Tensor, addresses: Iterable[int]) -> bool:
    storage = memory.untyped_storage()
    begin = address(memory) - memory.storage_offset() * memory.element_size()
    return any(begin <= each < begin + storage.nbytes() for each in addresses)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.is_complex():
        return _same_bits(torch.view_as_real(one), torch.view_as_real(other))
    bits = _BITS[one.element_size()]
    # A NaN is not equal to itself, and -0.0 is to 0.0.
    return torch.equal(one.view(bits), other.view(bits)) if one.dtype.is_floating_point else torch.equal(one, other)
