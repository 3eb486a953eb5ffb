"""What a step launches and what it holds, as torch's dispatcher sees it: exact, and the same on every machine.

On the meta device tensors have no values: nothing is computed, and whatever asks for a value raises.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Operations(TorchDispatchMode):
    """While entered, count every operation that reaches a backend, also in backward and in optimizers, views included.

    Attributes:
        calls: how often, by operation, such as ``torch.ops.aten.add_.Tensor``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.calls[operation] += 1  # not before: where a device has no kernel for it, another operation follows
        return result


class Memory(TorchDispatchMode):
    """While entered, follow the memory of the tensors that operations return, until they are freed.

    What a kernel allocates and frees inside is not seen.

    Attributes:
        peak: the most bytes at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # By identity, since on the meta device all addresses are 0; what is given from outside was there before.
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = operation(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given | self._known:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.live -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_iter(values) if isinstance(value, Tensor)]


def count_operations(step: Callable[[], object]) -> int:
    """Return how many operations one call of `step` launches."""
    with Operations() as operations:
        step()
    return operations.calls.total()


def peak_memory(step: Callable[[], object]) -> int:
    """Return the most bytes that one call of `step` holds at one time, in tensors that were not there before."""
    with Memory() as memory:
        step()
    return memory.peak


def on_meta(model: nn.Module, *shape: int) -> Callable[[], None]:
    """Return a step without values: a forward in training of a batch of that shape, and its backward."""
    model.to("meta").train()
    batch = torch.empty(shape, device="meta")

    def step() -> None:
        model(batch).sum().backward()
        model.zero_grad()

    return step


def operations_a_further_layer(layers: Callable[[nn.Sequential], nn.Module]) -> float:
    """Return how many operations a step gains with each convolution and batch norm that a network of them is deeper.

    Args:
        layers: what is done to a network of torch's layers, such as to convert it.
    """
    shallow, deep = 10, 20

    def operations(depth: int) -> int:
        pairs = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(depth)]
        step = on_meta(layers(nn.Sequential(*pairs)), 2, 8, 4, 4)
        step()  # a first forward may set things up
        return count_operations(step)

    return (operations(deep) - operations(shallow)) / (deep - shallow)
