"""Random number generators put back to where they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_bn.recalibration.transaction import completely

# Containers longer than this hold data and no generators.
_LONG = 64


@contextmanager
def kept_random_states(batches: object) -> Iterator[None]:
    """Put the random number generators back at exit: torch's, the accelerators', numpy's, Python's, and those in the
    loader `batches`."""
    restores = [
        _keeper(torch.get_rng_state, torch.set_rng_state),
        _keeper(random.getstate, random.setstate),
        *_accelerator_keepers(),
        *(generator_keeper(generator) for generator in _generators(batches)),
    ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        restores.append(_keeper(numpy.random.get_state, numpy.random.set_state))

    def restore() -> None:
        for each in restores:
            each()

    try:
        yield
    finally:
        completely(restore)


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


def is_generator(thing: object) -> bool:
    """Tell whether it is a generator of random numbers: torch's, Python's or numpy's."""
    numpy = sys.modules.get("numpy")
    kinds = (numpy.random.Generator, numpy.random.RandomState) if numpy else ()
    return isinstance(thing, (torch.Generator, random.Random, *kinds))


def generator_keeper(generator: Any) -> Callable[[], Any]:
    """Note where a generator of random numbers stands, and return what puts it back there."""
    if isinstance(generator, random.Random):
        return _keeper(generator.getstate, generator.setstate)
    if hasattr(generator, "set_state"):
        return _keeper(generator.get_state, generator.set_state)
    bits = generator.bit_generator
    return _keeper(lambda: bits.state, lambda state: setattr(bits, "state", state))


def _generators(source: object) -> list[Any]:
    """Return the random number generators that a loader holds: its own, its samplers', its datasets', and those of
    loaders inside it."""
    found, seen, waiting = [], set(), [source]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if is_generator(thing):
            found.append(thing)
        elif isinstance(thing, (list, tuple)) and len(thing) <= _LONG:
            waiting.extend(thing)
        elif isinstance(thing, Mapping) and len(thing) <= _LONG:
            waiting.extend(thing.values())
        elif thing is source or isinstance(thing, (DataLoader, Sampler, Dataset)):
            waiting.extend(getattr(thing, "__dict__", {}).values())
    return found
