"""Activations of batches that wait, kept in a file where memory has no room for those of all."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain, compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bn.recalibration.storages import StorageReference, watched
from lightning_bn.torch_internals import all_modules, buffers_of

# Smaller storages stay in memory.
_SMALL = 2**14


class Spilling:
    """Writes to a temporary file what waiting jobs hold, beyond a budget, and reads it back when they go on.

    What a job holds is found by recording the storages that torch's operations return while it runs. The first job is
    always recorded, and tells what each of them needs; the others are once all together need more than the budget. So
    below it nothing is slower. On an accelerator the file is pinned memory of the host.

    Args:
        budget: bytes that may be held in memory. None: no limit.
        model: what it holds in attributes stays in memory, since other batches read it too, and not by operations of
            torch alone.
    """

    def __init__(self, budget: float | None, model: nn.Module) -> None:
        self._model = model
        self.budget = float("inf") if budget is None else budget
        self.bytes = 0
        """The most that were in the file."""
        self.paused = False
        """Whether what operations return is of use to others than the job."""
        self._recording = False
        self._first = 0
        self._jobs: dict[int, dict[int, StorageReference]] = {}
        self._held: dict[int, int] = {}
        self._spilled: dict[int, tuple[StorageReference, _Slot]] = {}
        self._got: set[int] = set()
        """Storages that operations of the running job got."""
        self._file = _File()

    def running(self, job: int) -> AbstractContextManager[Any]:
        """Return the context in which a job runs on; what it holds is in memory again."""
        own = self._jobs.setdefault(job, {})
        self._held.pop(job, None)
        for key in own:
            self._read_back(key)
        recording = watched(self._before, partial(self._after, own)) if self._recording or not job else None
        return nullcontext() if recording is None else recording

    def _before(self, tensor: Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        if key in self._spilled:  # another job's, which the model holds
            self._read_back(key)
        self._got.add(key)

    def _after(self, own: dict[int, StorageReference], tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._got and not self.paused:
            own[storage._cdata] = StorageReference(storage)

    def waits(self, job: int) -> None:
        """Note that a job waits, and write what it holds to the file where all together hold more than the budget."""
        own = self._jobs[job]
        self._got.clear()
        held = {key: storage for key, reference in own.items() if (storage := reference.storage()) is not None}
        for key in own.keys() - held:
            del own[key]
        size = sum(storage.nbytes() for storage in held.values())
        if not job:
            self._first = size
        was_recorded = self._recording or not job
        self._recording = self._recording or self._first * (len(self._jobs) + 1) > self.budget
        size = size if was_recorded else self._first
        if not was_recorded or size + sum(self._held.values()) <= self.budget:
            self._held[job] = size
            return
        shared = self._held_by_the_model()
        for key, storage in held.items():
            # An array of numpy's over it has made a storage one that can't be resized.
            if key not in shared and storage.nbytes() > _SMALL and storage.resizable():
                self._spilled[key] = own[key], self._file.write(storage)
                storage.resize_(0)
        self.bytes = max(self.bytes, self._file.used)

    def _held_by_the_model(self) -> set[int]:
        # Asked for each waiting job, and so in C: a forward may put another tensor there.
        modules = all_modules(self._model)
        values = list(chain.from_iterable(map(dict.values, chain(map(vars, modules), map(buffers_of, modules)))))
        kinds = {kind for kind in set(map(type, values)) if issubclass(kind, Tensor)}
        tensors: Iterable[Any] = compress(values, map(kinds.__contains__, map(type, values)))
        return {each.untyped_storage()._cdata for each in tensors if each.layout is torch.strided}

    def close(self) -> None:
        """Read back what somebody still holds."""
        for key in list(self._spilled):
            self._read_back(key)
        self._file.close()

    def _read_back(self, key: int) -> None:
        if key in self._spilled:
            reference, slot = self._spilled[key]
            self._file.read(slot, reference.storage())
            del self._spilled[key]


_Slot = tuple[int, int, "Tensor | None"]
"""Offset in the file and number of bytes; on an accelerator, the copy on the host."""


class _File:
    """A temporary file of many parts, whose places are used again."""

    def __init__(self) -> None:
        self.used = 0
        self._file: Any = None
        self._end = 0
        self._free: dict[int, list[int]] = {}

    def write(self, storage: torch.UntypedStorage) -> _Slot:
        size = storage.nbytes()
        self.used += size
        if not _goes_to_a_file(storage):
            host = torch.empty(size, dtype=torch.uint8, pin_memory=storage.device.type != "cpu")
            host.untyped_storage().copy_(storage)
            return 0, size, host
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="lightning_bn-")  # noqa: SIM115 - closed by close()
        if self._free.get(size):
            offset = self._free[size].pop()
        else:
            offset, self._end = self._end, self._end + size
        self._file.seek(offset)
        self._file.write(_bytes(storage))
        return offset, size, None

    def read(self, slot: _Slot, storage: torch.UntypedStorage | None) -> None:
        """Read a part back into `storage`, and free its place; None where nobody holds the storage any more."""
        offset, size, host = slot
        if storage is not None:
            storage.resize_(size)
            if host is not None:
                storage.copy_(host.untyped_storage())
            else:
                self._file.seek(offset)
                self._file.readinto(_bytes(storage))
        if host is None:
            self._free.setdefault(size, []).append(offset)
        self.used -= size

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _goes_to_a_file(storage: torch.UntypedStorage) -> bool:
    return storage.device.type == "cpu"


def _bytes(storage: torch.UntypedStorage) -> memoryview:
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on `device`, within the limits of a container; None where nothing tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        found += [int(limit) - int(used)] if limit != "max" else []
    except OSError:  # not Linux, or no such limit
        pass
    return min(found, default=None)
