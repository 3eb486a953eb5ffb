"""The values of tensors, kept while others' code runs and put back where it wrote."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bn.modes import out_of_inference_mode
from lightning_bn.torch_internals import side_by_side

__all__ = ["KeptTensors"]

# Tensors up to this size are copied and compared side by side, in one go for all; larger ones each by itself.
_SMALL = 2**14
_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class KeptTensors:
    """Copies of `tensors`, by which writes into them are found and undone, bit for bit.

    A tensor's version counter tells of most writes at no cost, but neither of those through ``.data``, as averages of
    weights are often updated, nor of those of batch norm's kernel. So in the end values are compared. What is undone:
    values, in place; another storage (``p.data = ...``); ``requires_grad``; which tensor ``.grad`` is.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._kept = [_keep(tensor) for tensor in tensors if not _cant_be_written(tensor)]
            self._groups = [_Group(group) for group in _grouped(self._kept)]
        self._silent: list[tuple[_Kept, Tensor]] = []

    def restore(self) -> None:
        """Give every tensor back what it was."""
        for kept in self._kept:
            _restore_all_but_values(kept)
        for group in self._groups:
            for kept, value in group.changed():
                _write(kept, value)

    def find_silent_writes(self) -> None:
        """Compare all values once, so that `restore_written` knows of tensors that are written without being
        counted."""
        self._silent = [pair for group in self._groups for pair in group.changed()]

    def restore_written(self) -> None:
        """Give those their values back that say that they were written, or were found to be written without saying so;
        at little cost."""
        written = {id(kept.tensor) for kept in self._kept if _is_written(kept)}
        if written:
            for kept, value in [
                pair for group in self._groups for pair in group.values() if id(pair[0].tensor) in written
            ]:
                _restore_all_but_values(kept)
                _write(kept, value)
        for kept, value in self._silent:
            _write(kept, value)


class _Kept(NamedTuple):
    tensor: Tensor
    memory: Tensor
    """The same memory, and no parameter: it stays where the tensor was when another storage is put under that."""
    pointer: int
    version: int
    requires_grad: bool
    grad: Tensor | None


def _keep(tensor: Tensor) -> _Kept:
    grad = tensor.grad if tensor.is_leaf else None
    return _Kept(tensor, tensor.data, _pointer(tensor), _version(tensor), tensor.requires_grad, grad)


def _is_written(kept: _Kept) -> bool:
    return _version(kept.tensor) != kept.version or _pointer(kept.tensor) != kept.pointer


def _restore_all_but_values(kept: _Kept) -> None:
    tensor = kept.tensor
    if _pointer(tensor) != kept.pointer or tensor.shape != kept.memory.shape:
        tensor.data = kept.memory
    if tensor.is_leaf:
        if tensor.requires_grad != kept.requires_grad:
            tensor.requires_grad_(kept.requires_grad)
        if tensor.grad is not kept.grad:
            tensor.grad = kept.grad


class _Group:
    """Tensors of one type and device, copied into one."""

    def __init__(self, group: list[_Kept]) -> None:
        self._group = group
        self._memory = [kept.memory for kept in group]
        self._copy = self._memory[0].clone() if len(group) == 1 else side_by_side(self._memory)

    def values(self) -> list[tuple[_Kept, Tensor]]:
        if len(self._group) == 1:
            return [(self._group[0], self._copy)]
        parts = self._copy.split([memory.numel() for memory in self._memory])
        return [(kept, part.view(kept.memory.shape)) for kept, part in zip(self._group, parts, strict=True)]

    def changed(self) -> list[tuple[_Kept, Tensor]]:
        """Return the tensors whose bits are others now, with what they were."""
        if not _is_plain(self._group[0].tensor):
            return self.values()  # what its bits are can't be asked
        with torch.no_grad():
            now = self._memory[0] if len(self._group) == 1 else side_by_side(self._memory)
            if _same_bits(now, self._copy):
                return []
            return [(kept, value) for kept, value in self.values() if not _same_bits(kept.memory, value)]


def _grouped(all_kept: Iterable[_Kept]) -> list[list[_Kept]]:
    groups: dict[Any, list[_Kept]] = {}
    for kept in all_kept:
        memory = kept.memory
        together = memory.numel() <= _SMALL and _is_plain(kept.tensor)
        groups.setdefault((memory.dtype, memory.device) if together else id(kept.tensor), []).append(kept)
    return list(groups.values())


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_quantized


def _cant_be_written(tensor: Tensor) -> bool:
    """Whether it has no memory (on the meta device, or freed by FSDP), or one value stands at many places: no write in
    place goes there."""
    if tensor.is_meta or (_is_plain(tensor) and tensor.numel() > 0 and tensor.untyped_storage().size() == 0):
        return True
    strided = tensor.layout is torch.strided and not tensor.is_contiguous()
    return strided and any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.is_complex():
        return _same_bits(torch.view_as_real(one), torch.view_as_real(other))
    bits = _BITS[one.element_size()]
    # A NaN is not equal to itself, and -0.0 is to 0.0.
    return torch.equal(one.view(bits), other.view(bits)) if one.dtype.is_floating_point else torch.equal(one, other)


def _version(tensor: Tensor) -> int:
    """The number of in-place writes so far; a tensor made in inference mode does not count them."""
    return -1 if tensor.is_inference() else tensor._version


def _pointer(tensor: Tensor) -> int:
    return tensor.data_ptr() if _is_plain(tensor) else 0


def _write(kept: _Kept, value: Tensor) -> None:
    inference = kept.tensor.is_inference()
    with torch.inference_mode() if inference else out_of_inference_mode(), torch.no_grad():
        kept.memory.copy_(value)
