"""What a recalibration costs beside the forwards grows with the layers, and not faster; counted, not timed."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recalibration_models import mlp
from torch import Tensor, nn

import lightning_bn
from lightning_bn import recalibrate

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
from interpreted import count_python
from resnet import resnet50


def bytecodes(call: Callable[[], object]) -> int:
    """Return how many bytecodes of the package `call` runs, those of comprehensions too."""
    package, count = str(Path(lightning_bn.__file__).parent), 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(package):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize("exact", [False, True])
def test_four_times_the_layers_are_four_times_the_work(exact: bool) -> None:
    """In bytecodes of the package."""
    few, many = (mlp(layers) for layers in (40, 160))
    batches = list(torch.randn(2, 8, 10))

    def run(model: nn.Module, data: list[Tensor]) -> int:
        return bytecodes(lambda: recalibrate(model, data, exact=exact, progress=False))

    run(few, batches)  # imports
    assert run(many, batches) < 4 * run(few, batches)


def test_one_batch_takes_little_python_beside_the_forward() -> None:
    """At most 17,000 calls in a ResNet of 52 batch norms.

    At 0.85 us each (Python 3.11) they are a tenth of the 142 ms that fvcore's ``update_bn_stats`` takes for one batch
    of a ResNet-50, beside which a recalibration may cost 0.15.
    """
    model, batches = resnet50(4), [torch.randn(2, 3, 32, 32)]
    recalibrate(model, batches, progress=False)  # imports
    calls, _ = count_python(lambda: recalibrate(model, batches, progress=False))
    forward, _ = count_python(lambda: model(batches[0]))
    assert calls - forward <= 17_000


class Circle:
    """Is garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("enabled", [False, True])
def test_the_garbage_collector_is_as_before_and_meanwhile_finds_what_forwards_leave(enabled: bool) -> None:
    """Enabled or not, nothing frozen, also after an error; what was there before is not walked meanwhile."""
    model, died = mlp(2), []
    walked: list[int] = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        weakref.finalize(Circle(), died.append, True)
        walked.append(len(gc.get_objects()))
        for _ in range(10):
            [[] for _ in range(2000)]  # makes it look
        if len(walked) == 3:
            raise RuntimeError("of the forward")

    before = gc.isenabled(), len(gc.get_objects())
    (gc.enable if enabled else gc.disable)()
    try:
        recalibrate(model, list(torch.randn(2, 8, 10)), forward=forward, progress=False)
        assert bool(died) == enabled
        assert (max(walked) < before[1] // 2) == enabled
        with pytest.raises(RuntimeError, match="of the forward"):
            recalibrate(model, list(torch.randn(2, 8, 10)), forward=forward, progress=False)
        assert (gc.isenabled(), gc.get_freeze_count()) == (enabled, 0)
    finally:
        (gc.enable if before[0] else gc.disable)()


def test_a_collector_that_another_thread_enables_meanwhile_stays_enabled() -> None:
    """As a pass of its own does when it ends while this one, which began with none, goes on."""
    before = gc.isenabled()

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        gc.enable()

    gc.disable()
    try:
        recalibrate(mlp(2), [torch.randn(8, 10)], forward=forward, progress=False)
        assert gc.isenabled()
    finally:
        (gc.enable if before else gc.disable)()


def test_what_somebody_has_frozen_stays_frozen() -> None:
    """And none of what the pass makes is added to it; the collector looks among all else meanwhile."""
    gc.freeze()
    try:
        frozen, during = gc.get_freeze_count(), []
        recalibrate(
            mlp(2),
            [torch.randn(8, 10)],
            forward=lambda model, batch: (model(batch), during.append((gc.isenabled(), gc.get_freeze_count()))),
            progress=False,
        )
        assert during[0][0] == gc.isenabled()
        assert max(during[0][1], gc.get_freeze_count()) <= frozen
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
