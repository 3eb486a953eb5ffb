"""Whatever is raised at whatever point, all is as before; after success, all but the statistics."""

from __future__ import annotations

import contextlib
import gc
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recalibration_models import everything, statistics
from runs import quiet
from states import as_bytes
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset, WeightedRandomSampler

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
from interrupts import WAYS, stress

import lightning_bn
from lightning_bn import Window, recalibrate, recalibrated
from lightning_bn.recalibration.transaction import StatisticsChange


@pytest.fixture(autouse=True)
def _interrupts_are_heard() -> Iterator[None]:
    """A test run that was started in the background inherits that SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Busy(nn.Module):
    """A model in odd states: a frozen layer in eval, momentum None and 0, a shared layer, hooks, a buffer and random
    numbers in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(3, momentum=None)
        self.frozen = nn.BatchNorm1d(3).requires_grad_(False).eval()
        self.ours = lightning_bn.BatchNorm1d(3, averaging=Window(2))
        self.dropout = nn.Dropout(0.5)
        self.last = nn.BatchNorm1d(3, momentum=0.0)
        self.again = self.last
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.first.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.calls = self.calls.clone()
        x = self.dropout(self.ours(self.frozen(self.first(x)))) + torch.rand(3) + np.random.rand() + random.random()
        self.train()  # a model that does as it likes
        self.eval()
        return self.again(self.last(x))


def busy() -> Busy:
    model = Busy()
    for batch in torch.randn(3, 4, 3).unbind():
        model(batch)
    model.train()
    model.frozen.eval()
    return model


def loader() -> DataLoader[Any]:
    data = TensorDataset(torch.randn(20, 3))
    return DataLoader(
        data, 4, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(1)), generator=torch.Generator()
    )


def generators(batches: DataLoader[Any]) -> list[bytes]:
    return [as_bytes(g.get_state()) for g in (batches.generator, batches.sampler.generator)]


class Boom(BaseException):
    """Nothing that anybody catches."""


def raise_in_call(number: int, call: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(10**6))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise Boom
        return call(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("where", ["batches", "forward", "layer", "hook", "write", "bar"])
def test_an_exception_anywhere_changes_nothing(
    where: str, number: int, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the loader, the model, a layer, a hook, at the k-th write of the result, in the progress bar."""
    model, batches = busy(), loader()
    source: Any = batches
    forward = None
    if where == "batches":
        source = failing_after(number, batches)
    elif where == "forward":
        forward = raise_in_call(number, lambda model, batch: model(batch[0]))
    elif where == "layer":
        monkeypatch.setattr(model.last, "_check_input_dim", raise_in_call(number, model.last._check_input_dim))
    elif where == "hook":
        model.ours.register_forward_hook(raise_in_call(number, lambda *_: None))
    elif where == "write":
        number = number % 3
        monkeypatch.setattr(StatisticsChange, "write", raise_in_call(number, StatisticsChange.write))
    else:
        monkeypatch.setattr(
            "lightning_bn.recalibration.collection.tqdm.update", raise_in_call(number, lambda self, n=1: None)
        )
    before, drawn = everything(model), generators(batches)
    with pytest.raises(Boom):
        recalibrate(model, source, exact=exact, forward=forward, progress=where == "bar")
    assert before == everything(model)
    if where != "batches":
        assert drawn == generators(batches)


def failing_after(number: int, batches: DataLoader[Any]) -> Iterator[Any]:
    for count, batch in enumerate(batches):
        if count == number:
            raise Boom
        yield batch


@pytest.mark.parametrize("exact", [False, True])
def test_after_success_all_but_the_statistics_is_as_before(exact: bool) -> None:
    """Same objects, same storage, same flags, hooks, momenta, counters, random states, loader."""
    model, batches = busy(), loader()
    before, drawn, old = everything(model), generators(batches), statistics(model)
    recalibrate(model, batches, exact=exact, progress=False)
    after = everything(model)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {f"{layer}:running_{which}" for layer in ("first", "ours", "last") for which in ("mean", "var")}
    assert {key: before[key][:4] for key in changed} == {key: after[key][:4] for key in changed}
    assert drawn == generators(batches)
    assert torch.equal(old["frozen"][0], model.frozen.running_mean)


def test_an_epoch_drawn_after_it_is_the_one_that_would_have_been_drawn() -> None:
    """Shuffled by torch's generator, by the loader's, by a sampler's, by the dataset's own numpy and Python
    generators."""
    for make in LOADERS:
        orders = []
        for recalibrated_before in (False, True):
            torch.manual_seed(0)
            np.random.seed(0)
            random.seed(0)
            batches = make()
            if recalibrated_before:
                recalibrate(nn.BatchNorm1d(1), batches, num_batches=2, progress=False)
            orders.append(torch.cat([batch if isinstance(batch, Tensor) else batch[0] for batch in batches]))
        assert torch.equal(*orders)


class Noisy(Dataset[Tensor]):
    """A dataset that draws from generators of its own."""

    def __init__(self, generator: Any, draw: Callable[[Any], float]) -> None:
        self.generator, self.draw = generator, draw

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index + float(self.draw(self.generator)) + np.random.rand() + random.random()])


DATA = TensorDataset(torch.arange(12.0).unsqueeze(1))


class Wrapped:
    """A loader of somebody's around another."""

    def __init__(self) -> None:
        self.inner = [DataLoader(DATA, 4, shuffle=True, generator=torch.Generator())]

    def __iter__(self) -> Iterator[Any]:
        yield from self.inner[0]


LOADERS = [
    lambda: DataLoader(DATA, 4, shuffle=True),
    lambda: DataLoader(DATA, 4, shuffle=True, generator=torch.Generator()),
    lambda: DataLoader(DATA, 4, sampler=WeightedRandomSampler([1.0] * 12, 12, generator=torch.Generator())),
    lambda: DataLoader(Noisy(np.random.default_rng(0), lambda g: g.random()), 4),
    lambda: DataLoader(Noisy(np.random.RandomState(0), lambda g: g.rand()), 4),
    lambda: DataLoader(Noisy(random.Random(0), lambda g: g.random()), 4),
    lambda: DataLoader(DATA, 4, shuffle=True, num_workers=1),
    Wrapped,
]


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
