"""Wherever a Ctrl-C comes, a recalibration is done or undone, and nothing in between."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import quiet
from recalibration_models import busy, everything
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
from interrupts import WAYS, stress

import lightning_bn
from lightning_bn import recalibrate, recalibrated


@pytest.fixture(autouse=True)
def _interrupts_are_heard() -> Iterator[None]:
    """A test run that was started in the background inherits that SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("exact", [False, True])
def test_an_interrupt_at_any_line_changes_nothing(exact: bool) -> None:
    """A real SIGINT at line k of the package, for many k, until a run is no longer reached by it: KeyboardInterrupt,
    and all as before."""
    batches = list(torch.randn(2, 4, 3))
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.BatchNorm1d(3))
    before, handler = everything(model), signal.getsignal(signal.SIGINT)
    line, interrupted = 0, 0
    while interrupt_at(line, lambda: recalibrate(model, batches, exact=exact, progress=False)):
        assert before == everything(model), f"after line {line}"
        assert signal.getsignal(signal.SIGINT) is handler
        interrupted += 1
        line += 1 + line // 40  # every line at the start, every twentieth in the long middle
    assert interrupted > 50
    assert before != everything(model)


@pytest.mark.parametrize("exact", [False, True])
def test_an_interrupt_in_the_last_lines_changes_nothing(exact: bool) -> None:
    """Likewise for every one of the last lines, where the result is written and the handler given back."""
    batches = list(torch.randn(2, 4, 3))
    model = nn.Sequential(nn.BatchNorm1d(3))
    before = everything(model)
    lines = count_lines(lambda: recalibrate(model, batches, exact=exact, progress=False).rollback())
    for line in range(lines - 150, lines):
        if not interrupt_at(line, lambda: recalibrate(model, batches, exact=exact, progress=False)):
            break
        assert before == everything(model), f"after line {line}"
    assert line > lines - 130


PACKAGE = str(Path(lightning_bn.__file__).parent)


def traced(each_line: Callable[[], None], call: Callable[[], Any], within: tuple[str, ...] = (PACKAGE,)) -> None:
    def trace(frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(within):
            return None
        if event == "line":
            each_line()
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)


def count_lines(call: Callable[[], Any]) -> int:
    lines = []
    traced(lambda: lines.append(0), call)
    return len(lines)


def interrupt_at(line: int, call: Callable[[], Any], within: tuple[str, ...] = (PACKAGE,)) -> bool:
    """Send this process a SIGINT when the package reaches its line number `line`, counted as it runs; tell whether that
    ended the call."""
    return interruption_at(line, call, within) is not None


def interruption_at(
    line: int, call: Callable[[], Any], within: tuple[str, ...] = (PACKAGE,)
) -> KeyboardInterrupt | None:
    """Likewise, but return what ended the call, whose traceback holds all that the call's frames hold."""
    lines = iter(range(10**9))

    def each_line() -> None:
        if next(lines) == line:
            signal.raise_signal(signal.SIGINT)

    try:
        traced(each_line, call, within)
    except KeyboardInterrupt as error:
        return error
    return None


def test_a_second_interrupt_does_not_stop_the_undoing() -> None:
    """Ctrl-C pressed twice: the second one is held until all is put back."""
    model, batches, held = busy(), [torch.randn(4, 3)], []
    before = everything(model)

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        held.append(True)  # the first one is being undone
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, batches, forward=forward, progress=False)
    assert held
    assert before == everything(model)


def test_recalibrated_undoes_under_an_interrupt() -> None:
    """In the block, too."""
    model = busy()
    batches = list(torch.randn(2, 4, 3))
    before = everything(model)
    with pytest.raises(KeyboardInterrupt), recalibrated(model, batches, progress=False):
        signal.raise_signal(signal.SIGINT)
    assert before == everything(model)


@pytest.mark.parametrize("exact", [False, True])
def test_an_interrupt_while_garbage_is_collected_ends_the_pass(exact: bool) -> None:
    """Python can't raise there, and drops it; the pass ends with that batch, and all is as before."""
    model, batches, ran = busy(), list(torch.randn(3, 4, 3)), []

    def collects(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            signal.raise_signal(signal.SIGINT)

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        ran.append(True)
        gc.callbacks.append(collects)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(collects)

    before, report = everything(model), sys.unraisablehook
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, batches, forward=forward, exact=exact, progress=False)
    assert len(ran) == 1
    assert before == everything(model)
    assert sys.unraisablehook is report


def test_other_exceptions_while_garbage_is_collected_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are outside of a pass."""
    reported: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lambda lost: reported.append(lost.exc_type))

    class Bad:
        def __del__(self) -> None:
            raise OSError

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        Bad()

    recalibrate(busy(), [torch.randn(4, 3)], forward=forward, progress=False)
    assert reported == [OSError]


def test_recalibrated_is_all_or_nothing_at_any_line() -> None:
    """An interrupt at any of the last lines before the block: nothing has changed, while its traceback is still held.

    contextlib's lines count too.
    """
    model, batches = nn.Sequential(nn.BatchNorm1d(3)), list(torch.randn(2, 4, 3))
    before = everything(model)
    within = (PACKAGE, contextlib.__file__)
    inside: list[bool] = []

    def enter() -> None:
        with recalibrated(model, batches, progress=False):
            sys.settrace(None)
            inside.append(True)

    enter()
    lines: list[int] = []
    traced(lambda: lines.append(0), enter, within)
    for line in range(len(lines) - 60, len(lines)):
        error = interruption_at(line, enter, within)
        assert isinstance(error, KeyboardInterrupt), f"line {line}"
        assert before == everything(model), f"after line {line}"
    assert len(inside) == 2


@pytest.mark.parametrize("way", WAYS)
def test_interrupts_at_random_moments_change_nothing_or_the_report_is_returned(way: str) -> None:
    """A SIGINT from another thread, at any instruction, grad mode included; also in what the callback does within a
    fit. `benchmarks/interrupts.py` has more calls."""
    with quiet():
        call = WAYS[way]()
    ended = 0
    for _ in range(20):  # how many come within a call depends on what else the machine does
        new, wrong = stress(call, 30)
        assert wrong == []
        ended += new
        if ended > 5:
            break
    assert ended > 5


@pytest.mark.parametrize("exact", [False, True])
def test_an_interrupt_at_any_line_of_torchs_modes_leaves_the_grad_mode(exact: bool) -> None:
    """A guard of inference mode that an interrupt leaves in a traceback restores the grad mode when it is freed: too
    late."""
    batches, model = list(torch.randn(40, 4, 3)), nn.Sequential(nn.BatchNorm1d(3))
    line = 0
    modes = (PACKAGE, str(Path(torch.autograd.grad_mode.__file__)))
    while interrupt_at(line, lambda: recalibrate(model, batches, exact=exact, progress=False), within=modes):
        assert torch.is_grad_enabled(), f"after line {line}"
        assert not torch.is_inference_mode_enabled()
        line += 1 + line // 60
    assert line > 100
