"""No error of this package's own ends a fit, wherever in it the error comes: it is injected into every function that a
fit with all watching callbacks reaches."""

from __future__ import annotations

import inspect
import io
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fitting import trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bn
from lightning_bn import (
    ActivationStatsMonitor,
    BatchNormRecalibration,
    CompareAverages,
    DriftMonitor,
    ModeCheck,
    Window,
    convert_batch_norm,
)
from lightning_bn.error_boundary import RERAISE

PACKAGE = Path(lightning_bn.__file__).parent
ROOMS = ("activations", "callbacks", "comparison", "journal", "live_data", "recalibration", "rules")
"""The rooms that a watching callback is made of."""
NOT_WATCHING = ("callbacks/conversion.py", "callbacks/synchronisation.py", "callbacks/observing.py")
"""Callbacks that change what a fit computes, and the boundary itself."""


PROPERTIES = ("state_key", "_stable", "stable_text")
"""What Lightning reads of a callback outside of any hook: a string that is made of the class and an argument."""
HANDING_ON = ("__torch_function__", "while_training")
"""What is of its own there is the user's call, or two flags of a layer that are read; what comes of it is tried."""
MODELS = ("_save_to_state_dict",)
"""Of a module that is a part of the model: whoever asks for its state has to get it."""
ANOTHERS = ("DriftMonitor",)
"""What judges statistics that another callback has recalibrated: a fault in there leaves others, and both say so."""
RESTORING = ("completely", "rollback", "undo", "__exit__", "_restore_dict", "_restore_set")
"""What gives back what a pass has changed: nothing can stand in for it."""
FREEING = ("__del__",)
"""What is raised there Python itself catches and tells: it ends nothing, and no boundary hears of it."""
TRIED = ("batch_input.py", "lightning_internals.py")
"""Where a way to put a batch into the module that fails is followed by the next one."""


class InjectedError(Exception):
    """No error of anybody else."""


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            convert_batch_norm(nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3)), Window(2)),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Outcome(NamedTuple):
    """What a user has after a fit."""

    parameters: list[Tensor]
    statistics: list[Tensor]
    metrics: dict[str, Tensor]
    saved: list[Tensor]
    told: list[str]


def fit(folder: Path, *watchers: pl.Callback, meanwhile: AbstractContextManager[object] | None = None) -> Outcome:
    torch.manual_seed(0)
    module = Net()
    data = TensorDataset(torch.randn(16, 1, 6, 6), torch.arange(16) % 2)
    saver = ModelCheckpoint(folder / "saved", save_last=True)
    runner = trainer(
        *watchers, saver, max_epochs=2, logger=CSVLogger(folder), default_root_dir=folder, log_every_n_steps=1
    )
    with warnings.catch_warnings(record=True) as caught, meanwhile or nullcontext():
        warnings.simplefilter("always")
        runner.fit(module, DataLoader(data, 8, shuffle=True), DataLoader(data, 16))
    saved = torch.load(folder / "saved" / "last.ckpt", weights_only=False)["state_dict"]
    names = dict(module.named_parameters())
    return Outcome(
        [parameter.detach().clone() for parameter in names.values()],
        [value.clone() for value in module.state_dict().values() if value.is_floating_point()][len(names) :],
        {name: value.clone() for name, value in runner.callback_metrics.items()},
        [saved[name] for name in names],
        [str(each.message) for each in caught if "lightning_bn" in each.filename],
    )


WATCHERS: dict[str, Callable[[], list[pl.Callback]]] = {
    "ModeCheck": lambda: [ModeCheck()],
    "ActivationStatsMonitor": lambda: [ActivationStatsMonitor(heatmaps=False, gradients=True, histograms=True)],
    "BatchNormRecalibration": lambda: [BatchNormRecalibration()],
    "DriftMonitor": lambda: [BatchNormRecalibration(when="validation", spread=True), DriftMonitor(alarm=0.1)],
    "CompareAverages": lambda: [CompareAverages({"window": Window(2)})],
}
"""A function is tried with the first that reaches it."""


def functions() -> set[str]:
    """The files whose functions are tried."""
    files = {str(path) for room in ROOMS for path in (PACKAGE / room).rglob("*.py")}
    return files - {str(PACKAGE / each) for each in NOT_WATCHING}


@contextmanager
def traced(see: Callable[[FrameType], None]) -> Iterator[None]:
    """Call `see` with the frame of each call of a Python function."""

    def trace(frame: FrameType, event: str, arg: object) -> None:
        see(frame)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def begins(frame: FrameType) -> bool:
    """A generator is also called to go on, and to be closed by the garbage collector, where nobody hears of errors."""
    return not frame.f_code.co_flags & inspect.CO_GENERATOR or frame.f_lineno == frame.f_code.co_firstlineno


def reached(folder: Path, watcher: str) -> Counter[CodeType]:
    """How often a fit without a fault calls each function."""
    files, calls = functions(), Counter[CodeType]()

    def count(frame: FrameType) -> None:
        code = frame.f_code
        if code.co_filename in files and (code.co_name[0] != "<" or code.co_name == "<lambda>") and begins(frame):
            calls[code] += 1

    fit(folder, *WATCHERS[watcher](), meanwhile=traced(count))
    return calls


def fault(code: CodeType, call: int) -> AbstractContextManager[None]:
    """Raise at the `call`-th call of a function."""
    left = call

    def strike(frame: FrameType) -> None:
        nonlocal left
        if frame.f_code is code and begins(frame):
            left -= 1
            if not left:
                raise InjectedError(f"in {code.co_name}")

    return traced(strike)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("watcher", WATCHERS)
def test_no_fault_ends_or_changes_a_fit(
    watcher: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, the saved file and the module's own metrics are those without the callback, whichever function raises;
    the statistics are recalibrated or as they were; one warning tells.

    Functions are tried in turn at their first call and in the middle of their calls; ``FAULTS=all`` tries both.
    """
    monkeypatch.delenv(RERAISE)
    logging.getLogger("lightning_bn").addHandler(logging.NullHandler())  # or all tracebacks are printed
    monkeypatch.setattr(logging.getLogger("lightning_bn"), "propagate", False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())

    def folder() -> Path:
        return tmp_path_factory.mktemp("fit")

    plain, whole = fit(folder()), fit(folder(), *WATCHERS[watcher]())
    assert not whole.told
    earlier = [reached(folder(), name) for name in list(WATCHERS)[: list(WATCHERS).index(watcher)]]
    calls = {
        code: count
        for code, count in reached(folder(), watcher).items()
        if not any(code in each for each in earlier)
        and code.co_name not in (*PROPERTIES, *RESTORING, *HANDING_ON, *MODELS, *FREEING)
    }
    tried, wrong = 0, []
    for place, (code, count) in enumerate(sorted(calls.items(), key=lambda item: str(item[0]))):
        both = sorted({1, count // 2 + 1})
        for call in both if os.environ.get("FAULTS") else [both[place % len(both)]]:
            tried += 1
            try:
                outcome = fit(folder(), *WATCHERS[watcher](), meanwhile=fault(code, call))
                found = _differences(outcome, plain, whole, code)
                if watcher in ANOTHERS:
                    found = [each for each in found if each not in ("the metrics", "the statistics", "2 warnings")]
            except InjectedError:
                found = ["it ended the fit"]
            if found:
                wrong.append(f"{code.co_filename}:{code.co_firstlineno} {code.co_name}, call {call}: {found}")
    sys.stderr.write(f"{watcher}: {tried} faults in {len(calls)} functions\n")
    assert not wrong, "\n".join(wrong)


def _differences(found: Outcome, plain: Outcome, whole: Outcome, code: CodeType) -> list[str]:
    warned = len(found.told) == 1 or (not found.told and Path(code.co_filename).name in TRIED)
    return [
        *["the weights"] * (not _same(found.parameters, plain.parameters)),
        *["the saved weights"] * (not _same(found.saved, plain.saved)),
        *["the metrics"] * any(not torch.equal(found.metrics[name], value) for name, value in plain.metrics.items()),
        *["the statistics"]
        * (not _same(found.statistics, plain.statistics) and not _same(found.statistics, whole.statistics)),
        *[f"{len(found.told)} warnings"] * (not warned),
    ]


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))
