"""Tensors in a file that are read when they are asked for, each by itself."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_CHECKED = 1 << 20
"""Bytes up to which a record is read whole, so that its checksum is verified; norms are far smaller."""

_NAMES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("complex64", "complex128"),
)
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    """Reads it; raises what damaged bytes raise."""


def from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    """Return the values in `data`, (n,)."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def strided(
    read: Callable[[int, int], bytes], dtype: torch.dtype, offset: int, shape: Sequence[int], stride: Sequence[int]
) -> StoredTensor:
    """Return a tensor that lies in a storage as `shape` and `stride` say.

    Args:
        read: returns the bytes of the storage from one place to another.
        dtype: of the tensor.
        offset: of its first element in the storage, in elements.
        shape, stride: as `torch.as_strided` takes them.

    Raises:
        ValueError: no tensor lies so, or it says one element many times.
    """
    numbers = (offset, *shape, *stride)
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or len(shape) != len(stride):
        raise ValueError("a tensor of impossible shape")
    span = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1 if math.prod(shape) else 0
    if math.prod(shape) > span:
        raise ValueError("a tensor that names its elements more than once")

    def load() -> Tensor:
        first = offset * dtype.itemsize
        values = from_bytes(read(first, first + span * dtype.itemsize), dtype)
        if len(values) != span:
            raise ValueError("its storage is too short")
        return torch.as_strided(values, tuple(shape), tuple(stride))

    return StoredTensor(tuple(shape), load)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor whose elements lie one behind the other.

    Example:
        >>> contiguous((2, 3, 4))
        (12, 4, 1)
    """
    return tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))


class Archive:
    """The records of a zip archive, as ``torch.save``, ``torch.jit.save``, ``torch.export.save`` and numpy write them.

    Args:
        path: of the file, of which the directory alone is read.

    Raises:
        zipfile.BadZipFile: it has none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = zipfile.ZipFile(path)
        self.records = {info.filename: info for info in self._file.infolist()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes of a record from one place to another.

        Raises:
            ValueError, zipfile.BadZipFile: it is packed, or damaged.
        """
        info = self.records[name]
        if info.compress_type != zipfile.ZIP_STORED and info.file_size > 100 * _CHECKED:
            raise ValueError(f"record {name} is {info.file_size} bytes, packed")
        with self._file.open(info) as record:
            if info.file_size <= _CHECKED or info.compress_type != zipfile.ZIP_STORED:
                return record.read()[start:stop]  # to the end, where the checksum is compared
            record.seek(start)
            return record.read(-1 if stop is None else stop - start)

    def damaged(self) -> list[str]:
        """Return the small records that do not have the checksum that was written beside them."""
        found = [] if self._whole() else ["(the directory)"]
        for name, info in self.records.items():
            if info.file_size <= _CHECKED:
                try:
                    with self._file.open(info) as record:
                        record.read()
                except Exception:  # whatever the reader trips over: damaged it is
                    found.append(name)
        return found

    def _whole(self) -> bool:
        """Whether the directory has as many records as the end of the file counts."""
        with self.path.open("rb") as file:
            file.seek(max(0, self.path.stat().st_size - (1 << 16)))
            *_, end = file.read().split(b"PK\x05\x06")
        count = int.from_bytes(end[6:8], "little")  # all ones in an archive of more
        return count in (len(self.records), 0xFFFF)
