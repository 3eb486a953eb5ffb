"""Reads a pickle without importing or calling anything that it names: what it would build stays a description."""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable, Iterator
from typing import IO, Any


class Described:
    """An object that a pickle describes and that is not built: a function and arguments, or a class and state.

    Each global of the pickle becomes a subclass of its own, so that the opcodes that make an object find a class.
    """

    module = name = ""
    args: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any]
    members: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Described:
        made = super().__new__(cls)
        made.args = (*args, *kwargs.values())
        made.items = {}
        made.members = []
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, member: Any) -> None:
        self.members.append(member)

    def extend(self, members: Any) -> None:
        self.members.extend(members)

    add = append

    @classmethod
    def full_name(cls) -> str:
        return f"{cls.module}.{cls.name}"

    def state_parts(self) -> Iterator[Any]:
        """The parts of the state, which classes with slots give as a pair."""
        yield from self.state if isinstance(self.state, tuple) else (self.state,)


class _Items(dict[Any, Any]):
    """An OrderedDict, whose attributes (a state_dict has versions there) say nothing here."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Reader(pickle.Unpickler):
    def __init__(self, file: IO[bytes], persistent: Callable[[Any], Any]) -> None:
        super().__init__(file)
        self.persistent = persistent
        self.found: dict[tuple[str, str], type[Any]] = {("collections", "OrderedDict"): _Items}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key not in self.found:
            self.found[key] = type("Described", (Described,), {"module": module, "name": name})
        return self.found[key]

    def persistent_load(self, pid: Any) -> Any:
        return self.persistent(pid)


def read_pickle(file: IO[bytes], persistent: Callable[[Any], Any] | None = None) -> tuple[Any, set[str]]:
    """Return what the pickle describes at which the file stands, and the names of what it would build; leave the file
    at its end.

    Args:
        file: bytes in memory, or a file mapped into it: a length that a damaged pickle claims reserves nothing there.
        persistent: what a persistent id, by which ``torch.save`` names a storage, stands for; without one it is
            refused.

    Raises:
        ValueError, and what `pickle.Unpickler` raises for damaged bytes.

    Example:
        >>> import io, pathlib, pickle
        >>> data = pickle.dumps({"lr": 0.1, "where": pathlib.PurePosixPath("data")})
        >>> found, names = read_pickle(io.BytesIO(data))
        >>> found["lr"], found["where"].full_name(), found["where"].args
        (0.1, 'pathlib.PurePosixPath', ('data',))
    """
    start = file.tell()
    # The unpickler reserves memory for whatever index a memo opcode names, so a flipped byte may ask for 64 GB.
    for made, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if "PUT" in opcode.name and not 0 <= int(argument or 0) <= made:
            raise ValueError("a memo index beyond what was made")
    end = file.tell()
    file.seek(start)
    reader = _Reader(file, persistent or _refused)
    content = reader.load()
    file.seek(end)
    return content, {f"{module}.{name}" for module, name in reader.found} - {"collections.OrderedDict"}


def _refused(pid: Any) -> Any:
    raise ValueError("a persistent id, of which this file has no storages")
