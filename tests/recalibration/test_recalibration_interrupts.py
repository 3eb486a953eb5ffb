"""A Ctrl-C leaves the model as it was or, once the new statistics are written, new."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recalibration_models import busy, everything
from torch import Tensor, nn

import lightning_bn
from lightning_bn import recalibrate, recalibrated
from lightning_bn.recalibration import kept_objects, kept_tensors, random_states, transaction


@pytest.fixture(autouse=True)
def interrupts_are_heard() -> Iterator[None]:
    """A test run that was started in the background inherits that SIGINT is ignored; one that comes where none was
    expected fails its test alone, by `conftest.pytest_pyfunc_call`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# Where what the pass or the user's forward wrote is undone. `completely` itself and the context managers around it are
# not in it: between two of their instructions Python can't hold an interrupt back.
UNDOING = {
    *(kept_objects.__file__, kept_tensors.__file__, random_states.__file__, transaction.__file__),
    str(Path(lightning_bn.__file__).parent / "buffers.py"),
}
AROUND = {"kept", "kept_random_states", "completely", "commit"}


def interrupt_at(line: int, call: Callable[[], Any], *, undoing: bool) -> bool:
    """Send this process a SIGINT at the line number `line` that the package runs, of all or of those that undo, and
    tell whether the call got so far."""
    lines = iter(range(10**9))
    package = str(Path(lightning_bn.__file__).parent)

    def trace(frame: Any, event: str, _: Any) -> Any:
        code = frame.f_code
        wanted = (
            code.co_filename in UNDOING and code.co_name not in AROUND
            if undoing
            else code.co_filename.startswith(package)
        )
        if not wanted:
            return trace if event == "call" and code.co_filename.startswith(package) else None
        if event == "line" and next(lines) == line:
            signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("exact", [False, True])
def test_an_interrupt_while_it_prepares_or_undoes_changes_nothing(exact: bool) -> None:
    """At any line of what prepares, writes and undoes: KeyboardInterrupt, and all is as before; nothing is half
    undone."""
    batches, model = list(torch.randn(2, 4, 3)), busy()
    before = everything(model)
    line = 0
    while interrupt_at(line, lambda: recalibrate(model, batches, exact=exact, progress=False), undoing=True):
        assert before == everything(model), f"after line {line}"
        line += 1 + line // 40
    assert line > 400
    assert before != everything(model)


def test_an_interrupt_while_statistics_are_rolled_back_leaves_the_old_ones() -> None:
    """At any line: the old statistics are there, all of them."""
    batches, model = list(torch.randn(2, 4, 3)), busy()
    before, line = everything(model), 0
    while interrupt_at(line, recalibrate(model, batches, progress=False).rollback, undoing=True):
        assert before == everything(model), f"after line {line}"
        line += 1
    assert line > 10


def test_recalibrated_undoes_under_an_interrupt() -> None:
    """In the block, too."""
    model = busy()
    batches = list(torch.randn(2, 4, 3))
    before = everything(model)
    with pytest.raises(KeyboardInterrupt), recalibrated(model, batches, progress=False):
        signal.raise_signal(signal.SIGINT)
    assert before == everything(model)


@pytest.mark.parametrize("exact", [False, True])
def test_an_interrupt_in_the_forward_changes_nothing(exact: bool) -> None:
    """In the second batch, at the layers' level."""
    model, batches, ran = busy(), list(torch.randn(3, 4, 3)), []

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        ran.append(True)
        if len(ran) == 2:
            signal.raise_signal(signal.SIGINT)

    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, batches, forward=forward, exact=exact, progress=False)
    assert len(ran) == 2
    assert before == everything(model)
