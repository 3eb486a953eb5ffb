"""Many batches through one network together: each stops at a layer until all have come, and then all go on.

Every batch is a greenlet: a call that can stop anywhere below it, inside generators and other people's forwards too,
and go on later, on the same thread. Threads with a baton would do as well, and would keep torch's thread-local state
apart by themselves, but OpenMP gives each thread that computes a pool of its own (200 batches on 64 cores: 12800
threads), CUDA gives each its own current device and stream, and Ctrl-C reaches only the main one. So torch's state is
handed over here: whoever stops takes his grad, inference and autocast modes with him, and gets them back.
"""

from __future__ import annotations

import contextvars
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet

from lightning_bn.recalibration.spilling import Spilling
from lightning_bn.recalibration.storages import in_compiled_call

Stop = tuple[int, int]
"""Place of a layer, and how often the batch has stopped there before. Stops are gone on from in this order."""


class Lockstep:
    """Runs jobs that stop and wait for each other.

    Args:
        agree: called with the first stop, in order, at which a job waits (None where no job waits); returns the one to
            go on from, None to end. Several ranks agree here on the same.
        arrived: called with a layer's place when every job that comes has come to the stop, before they go on.
        spilling: keeps what waiting jobs hold within a budget of memory.

    Where some jobs wait at one layer and some at another, one that skipped the first or took another branch, the layer
    that the model registered first goes on first; its jobs then catch up.
    """

    def __init__(
        self, agree: Callable[[Stop | None], Stop | None], arrived: Callable[[int], None], spilling: Spilling
    ) -> None:
        self._agree = agree
        self._arrived = arrived
        self._spilling = spilling
        self._jobs: list[_Job] = []
        self._waiting: dict[Stop, list[_Job]] = {}

    def stop(self, place: int) -> None:
        """Wait, inside a job, until all jobs that come to the layer at `place` have come."""
        job = self._running_job()
        if not job.stops and in_compiled_call():
            raise RuntimeError(
                "recalibrate(model, batches, exact=True): a batch-norm layer was called from a compiled function or a "
                "compiled method of a class, which can't wait there for the other batches. Pass the forward as it was "
                "before torch.compile, forward=lambda model, batch: ..., or leave exact=True out."
            )
        stop = (place, job.stops[place])
        job.stops[place] += 1
        with _switched_to(self._state):
            self._hub.switch(stop)

    def current(self) -> int:
        """Return the number of the job that is running."""
        return self._running_job().number

    def _running_job(self) -> _Job:
        job = getcurrent()
        if isinstance(job, _Job) and job.owner is self:
            return job
        if isinstance(job, _Job):
            raise RuntimeError(
                "recalibrate(model, batches, exact=True): the forward of one such pass began another over the same "
                "layers. Run the inner one before, or after, or leave exact=True out of it."
            )
        raise RuntimeError(
            "recalibrate(model, batches, exact=True): a batch-norm layer was called from a thread or a greenlet of the "
            "model's own, and can't wait there for the other batches. Let the forward call its layers itself, or leave "
            "exact=True out."
        )

    def run(self, jobs: Iterable[Callable[[], object]]) -> None:
        """Run `jobs` to their ends; what one of them raises ends all, each with its ``finally``, and is raised."""
        self._hub, self._state = getcurrent(), _thread_state()
        try:
            for number, call in enumerate(jobs):
                self._jobs.append(_Job(call, number, self))
                self._resume(self._jobs[-1])
            while (stop := self._agree(min(self._waiting, default=None))) is not None:
                self._arrived(stop[0])
                for job in self._waiting.pop(stop, ()):
                    self._resume(job)
        finally:
            self._end()

    def _resume(self, job: _Job) -> None:
        with self._spilling.running(job.number):
            stop = job.switch()
        if not job.dead:
            self._spilling.waits(job.number)
            self._waiting.setdefault(stop, []).append(job)

    def _end(self) -> None:
        for job in self._jobs:
            while not job.dead:
                # Its with-blocks and finally-clauses run; whatever they raise came after the error that ends it all.
                with suppress(Exception), self._spilling.running(job.number):
                    job.throw(GreenletExit)
        self._spilling.close()


class _Job(greenlet):  # type: ignore[misc]
    def __init__(self, call: Callable[[], object], number: int, owner: Lockstep) -> None:
        super().__init__(call)
        self.owner = owner
        self.gr_context = contextvars.copy_context()
        self.number = number
        self.stops: Counter[int] = Counter()


def _device_types() -> list[str]:
    # Without a device, torch 2.6 raises where later versions return None.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _thread_state() -> tuple[Any, ...]:
    """The modes that torch keeps by thread and that a forward may change around a layer."""
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _device_types()]
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), autocast


@contextmanager
def _switched_to(state: tuple[Any, ...]) -> Iterator[None]:
    """Set the modes to `state`; give those of the block's beginning back at its end."""
    if _thread_state() == state:
        yield
        return
    inference, grad, cache, autocast = state
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        for kind, enabled, dtype in autocast:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
        yield
