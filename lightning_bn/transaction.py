"""What a pass over data touches besides the statistics, put back; and the change of the statistics, made or undone as a whole."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, Sampler

__all__ = ["StatisticsChange", "commit", "eager", "kept_buffers", "kept_random_states", "undo"]


@dataclass(frozen=True)
class StatisticsChange:
    """New running statistics of one layer, beside the ones it had."""

    layer: _BatchNorm
    old: tuple[Tensor, Tensor]  # copies of running_mean and running_var, (C,)
    new: tuple[Tensor, Tensor]  # in the buffers' dtype and on their device

    def write(self, statistics: tuple[Tensor, Tensor]) -> None:
        """Write mean and variance into the layer's buffers, in place."""
        with torch.no_grad():
            self.layer.running_mean.copy_(statistics[0])
            self.layer.running_var.copy_(statistics[1])


def undo(changes: list[StatisticsChange]) -> None:
    """Write the old statistics of every change back."""
    for change in changes:
        change.write(change.old)


def commit(changes: list[StatisticsChange]) -> None:
    """Write the new statistics of every change, or, whatever is raised on the way, of none."""
    try:
        for change in changes:
            change.write(change.new)
    except BaseException:
        undo(changes)
        raise


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Give every module its own buffers back at exit, the same tensors with the same values."""
    kept = [
        (module, name, buffer, buffer.detach().clone(), _version(buffer))
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, value, version in kept:
            setattr(module, name, buffer)
            if version is None or _version(buffer) != version:
                with torch.no_grad():
                    buffer.copy_(value)


def _version(buffer: Tensor) -> int | None:
    """The number of in-place writes so far; a tensor made in inference mode does not count them."""
    return None if buffer.is_inference() else buffer._version


@contextmanager
def kept_random_states(batches: object) -> Iterator[None]:
    """Put the random number generators back at exit: torch's, the accelerators', numpy's, Python's, and those in the loader `batches`."""
    restores = [
        _keeper(torch.get_rng_state, torch.set_rng_state),
        _keeper(random.getstate, random.setstate),
        *_accelerator_keepers(),
        *(_generator_keeper(generator) for generator in _generators(batches)),
    ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        restores.append(_keeper(numpy.random.get_state, numpy.random.set_state))
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _keeper(get: Callable[[], Any], put: Callable[[Any], Any]) -> Callable[[], Any]:
    state = get()
    return lambda: put(state)


def _accelerator_keepers() -> Iterator[Callable[[], Any]]:
    if not torch.accelerator.is_available():
        return
    module = torch.get_device_module(torch.accelerator.current_accelerator())
    # Asking CUDA for its state starts it, on every device; a CUDA that has not started has drawn nothing.
    if getattr(module, "is_initialized", lambda: True)():
        suffix = "_all" if hasattr(module, "get_rng_state_all") else ""
        yield _keeper(getattr(module, f"get_rng_state{suffix}"), getattr(module, f"set_rng_state{suffix}"))


def _generator_keeper(generator: Any) -> Callable[[], Any]:
    if isinstance(generator, torch.Generator):
        return _keeper(generator.get_state, generator.set_state)
    if isinstance(generator, random.Random):
        return _keeper(generator.getstate, generator.setstate)
    bits = generator.bit_generator
    return _keeper(lambda: bits.state, lambda state: setattr(bits, "state", state))


def _generators(source: object) -> list[Any]:
    """Return the random number generators that a loader holds: its own, its samplers', its datasets', and those of loaders inside it."""
    numpy = sys.modules.get("numpy")
    kinds = (torch.Generator, random.Random, *([numpy.random.Generator] if numpy else []))
    found, seen, waiting = [], set(), [source]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, kinds):
            found.append(thing)
        elif isinstance(thing, (list, tuple)) and len(thing) <= 64:
            waiting.extend(thing)
        elif isinstance(thing, Mapping) and len(thing) <= 64:
            waiting.extend(thing.values())
        elif thing is source or isinstance(thing, (DataLoader, Sampler, Dataset)):
            waiting.extend(getattr(thing, "__dict__", {}).values())
    return found


def eager() -> Any:
    """Return a context in which compiled models run as they were written: the code that was compiled knows nothing of later hooks."""
    # Asking torch.compiler imports the compiler, which takes seconds; where it isn't there yet, nothing can be compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
