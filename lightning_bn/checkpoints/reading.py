"""Reads what is in a checkpoint file, whoever wrote it; nothing in it runs."""

from __future__ import annotations

import io
import json
import math
import mmap
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_bn.checkpoints.norms import printable
from lightning_bn.checkpoints.stored import DTYPES, Archive, StoredTensor, contiguous, strided
from lightning_bn.checkpoints.unpickling import read_pickle


class CheckpointRefusedError(ValueError):
    """The file can't be read safely, or holds no batch norm."""


@dataclass(frozen=True)
class Contents:
    """What a file holds."""

    value: Any
    """Mappings and sequences; tensors are read when they are used."""
    described: tuple[str, ...] = ()
    """The classes and functions that it names and that were neither imported nor called."""
    damaged: tuple[str, ...] = ()
    """Records whose checksum is wrong."""


def read_checkpoint(path: Path, *, weights_only: bool = True) -> Any:
    """Load a file on the CPU, by ``torch.load``.

    Raises:
        FileNotFoundError: no such file.
        CheckpointRefusedError: it is no checkpoint, is damaged, or with `weights_only` holds more than tensors and
            plain data.
    """
    _refuse_missing(path)
    with plainly(path):
        _refuse_foreign(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=weights_only)
        except pickle.UnpicklingError as error:
            named = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")
            if not named:
                raise
            raise CheckpointRefusedError(f"{path} is refused, and nothing in it was run: {printable(named)}") from error


def read_contents(path: Path) -> Contents:
    """Describe what is in a file: of ``torch.save``, new or old, a pickle, safetensors or npz, or in a folder of model
    files.

    Nothing in it runs and nothing that it names is imported. Tensors stay in the file until they are used.

    Raises:
        FileNotFoundError: no such file.
        CheckpointRefusedError: it is of another kind, or damaged.
    """
    if path.is_dir():
        return _folder(path)
    _refuse_missing(path)
    with plainly(path):
        _refuse_foreign(path)
        with path.open("rb") as file:
            head = file.read(9)
        if head.startswith(b"PK"):
            return _of_archive(_archive(path))
        if head.startswith(b"\x80"):
            return _of_pickles(path)
        return Contents(_of_safetensors(path))


def _folder(path: Path) -> Contents:
    files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        hint = "; it is a distributed checkpoint: torch.distributed.checkpoint.format_utils makes one file of it"
        raise FileNotFoundError(f"{path} is a folder; give a file that is in it{hint * (path / '.metadata').is_file()}")
    each = [read_contents(file) for file in files]
    return Contents(
        {key: value for part in each if isinstance(part.value, dict) for key, value in part.value.items()},
        tuple(name for part in each for name in part.described),
        tuple(f"{file.name}:{name}" for file, part in zip(files, each, strict=True) for name in part.damaged),
    )


def _refuse_missing(path: Path) -> None:
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder; give a file that is in it")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")


@contextmanager
def plainly(path: Path) -> Iterator[None]:
    """Damaged bytes raise whatever the parser of the moment trips over; the user hears of the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointRefusedError:
        raise
    except (OSError, MemoryError) as error:
        raise CheckpointRefusedError(f"{path} can't be read: {printable(error)}") from error
    except Exception as error:
        why = printable(str(error).strip().partition("\n")[0])[:200]
        raise CheckpointRefusedError(f"{path} is damaged, or no checkpoint: {why or type(error).__name__}") from error


_RUN = "is judged by its answers: check_export({}, model, batch)"
_KINDS = (
    (b"version https://git-lfs", "a pointer of Git LFS; the file itself comes with: git lfs pull"),
    (b"\x89HDF", "an HDF5 file, as Keras writes it; docs/porting.md says how its statistics become torch's"),
    (b"\x93NUMPY", "one numpy array without a name; save all by their names, as in numpy.savez(path, **arrays)"),
    (b"\x1f\x8b", "packed by gzip; unpack it first"),
    (b'<?xml version="1.0"?>\n<net ', f"a program of OpenVINO, which {_RUN.format('openvino.compile_model(path)')}"),
    (b"GGUF", "a GGUF file, which has no batch norm"),
    (b"<", "a page of HTML or XML, perhaps in the place of a download that failed"),
)


def _refuse_foreign(path: Path) -> None:
    """Say in plain words what a file is that is no checkpoint."""
    with path.open("rb") as file:
        head = file.read(4096)
    what = "empty" if not head else next((text for start, text in _KINDS if head.startswith(start)), None)
    if what is None and _is_text(head):
        what = "a text file"
    if what is not None:
        raise CheckpointRefusedError(f"{path} is no checkpoint: it is {what}.")


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # where it is no character that the end cuts through
            return False
        text = head[: error.start].decode()
    return all(each.isprintable() or each.isspace() for each in text)


def archive_of(path: Path) -> Archive | None:
    """Return a file's records where it is a zip archive.

    Raises:
        FileNotFoundError: no such file.
        CheckpointRefusedError: it begins as one and has no end.
    """
    if path.is_dir():
        return None
    _refuse_missing(path)
    with plainly(path), path.open("rb") as file:
        return _archive(path) if file.read(2) == b"PK" else None


def _archive(path: Path) -> Archive:
    try:
        return Archive(path)
    except zipfile.BadZipFile as error:
        raise CheckpointRefusedError(
            f"{path} is damaged or cut short: it begins as an archive of torch.save, and has no directory at its end."
        ) from error


def _of_archive(archive: Archive) -> Contents:
    names = archive.records
    pickled = next((name for name in names if name.rpartition("/")[2] == "data.pkl" and name.count("/") <= 1), None)
    arrays = {name.removesuffix(".npy"): _npy(archive, name) for name in names if name.endswith(".npy")}
    if pickled is None and arrays:
        if all(name.startswith("arr_") for name in arrays):
            raise CheckpointRefusedError(
                f"{archive.path} holds {len(arrays)} arrays without names. Save them by the keys of the state_dict, as "
                "in numpy.savez(path, **{key: value.numpy() for key, value in model.state_dict().items()})."
            )
        return Contents(arrays, (), tuple(archive.damaged()))
    if any("/aotinductor/" in name for name in names):
        run = _RUN.format("torch._inductor.aoti_load_package(path)")
        raise CheckpointRefusedError(f"{archive.path} is machine code of AOTInductor, which {run}.")
    if pickled is None:
        raise CheckpointRefusedError(f"{archive.path} is a zip archive, and none of torch.save.")
    if any(name.endswith("constants.pkl") for name in names):
        raise CheckpointRefusedError(f"{archive.path} is a program of TorchScript, and no checkpoint.")
    damaged = tuple(archive.damaged())
    try:
        return Contents(torch.load(archive.path, map_location="cpu", weights_only=True, mmap=True), (), damaged)
    except Exception:  # it holds other objects, or is damaged
        pass
    folder = pickled.removesuffix("data.pkl")
    if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
        raise CheckpointRefusedError(f"{archive.path} was written on a big-endian machine.")
    value, described = read_pickle(io.BytesIO(archive.read(pickled)), partial(storage_of, archive, f"{folder}data/"))
    return Contents(value, tuple(sorted(described - _TENSORS)), damaged)


@dataclass(frozen=True)
class _Storage:
    """What a persistent id names; `read` returns its bytes from one place to another."""

    dtype: torch.dtype
    read: Callable[[int, int], bytes]


def storage_of(archive: Archive, folder: str, pid: Any) -> Any:
    """Return what a persistent id in a pickle of an archive stands for; its bytes are a record in `folder`."""
    _, kind, key, *_ = pid
    return _Storage(_STORAGES[kind.name], partial(archive.read, f"{folder}{key}"))


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    # Of the others (float8, quantised) the bytes are enough: a norm has none of them.
    "UntypedStorage": torch.uint8,
}
_TENSORS = frozenset(
    {f"torch.{name}" for name in (*_STORAGES, *DTYPES)}
    | {f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "parameter", "parameter_with_state")}
)


def _of_pickles(path: Path) -> Contents:
    """A file of ``torch.save`` before version 1.6, or any pickle. Its storages follow the pickles, each behind its
    length."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        data: Any = mapped  # read as a file, which it is but for the name of its type
        places: dict[str, int] = {}
        sizes: dict[str, int] = {}
        itemsizes: dict[str, int] = {}

        def storage(pid: Any) -> Any:
            if pid[0] == "module":  # a class, with the text of its program
                return pid[1]
            _, kind, key, _, count, *view = pid
            if any(view):
                raise ValueError("a storage that is a view of another")
            itemsizes[key] = _STORAGES[kind.name].itemsize
            sizes[key] = count * _STORAGES[kind.name].itemsize
            return _Storage(
                _STORAGES[kind.name], lambda start, stop: _between(path, places[key], sizes[key], start, stop)
            )

        value, described = read_pickle(data, storage)
        if value == _MAGIC:
            read_pickle(data)  # the version
            read_pickle(data)  # the sizes of C's types
            value, described = read_pickle(data, storage)
            end = 0
            for key in read_pickle(data)[0]:
                end = end or data.tell()
                if int.from_bytes(data[end : end + 8], "little") * itemsizes[key] != sizes[key]:
                    raise ValueError(f"storage {key} has another length than the tensors that lie in it")
                places[key] = end + 8
                end += 8 + sizes[key]
        return Contents(value, tuple(sorted(described - _TENSORS)))


_MAGIC = 0x1950A86A20F9469CFC6C


def _between(path: Path, place: int, size: int, start: int, stop: int) -> bytes:
    with path.open("rb") as file:
        file.seek(place + start)
        return file.read(min(stop, size) - start)


def _of_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Its header is JSON behind its length; the tensors' bytes follow, in the order of C."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= path.stat().st_size - 8:
            raise ValueError("neither of torch.save, nor safetensors, nor npz")
        header = json.loads(file.read(length))
    found = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        (first, last), shape = entry["data_offsets"], entry["shape"]
        dtype = _SAFE.get(entry["dtype"])
        if dtype is None:  # float8 and the like, which no norm keeps
            found[key] = StoredTensor(tuple(shape), partial(_refused_dtype, entry["dtype"]))
        elif last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{key} has another length than its shape says")
        else:
            read = partial(_between, path, 8 + length + first, last - first)
            found[key] = strided(read, dtype, 0, shape, contiguous(shape))
    return found


def _refused_dtype(name: str) -> Tensor:
    raise ValueError(f"its numbers are {name}")


_SAFE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _npy(archive: Archive, name: str) -> StoredTensor:
    """An array of an npz file; its header tells shape and kind, and the rest is read when it is used."""
    shape: tuple[int, ...] = ()
    with suppress(Exception):  # a damaged header: reading the array says so
        head = io.BytesIO(archive.read(name, 0, 4096))
        version = np.lib.format.read_magic(head)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, _ = read_header(head)
    return StoredTensor(shape, lambda: torch.from_numpy(np.load(io.BytesIO(archive.read(name)), allow_pickle=False)))
