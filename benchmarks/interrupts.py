"""Ctrl-C at random moments: after each, either nothing has changed or the report was returned.

Run `python benchmarks/interrupts.py --calls 1000`; it prints, for each way in, how many calls an interrupt ended and
how many left something behind, and ends with status 1 where any did. `--path` takes the package from another folder.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

Call = Callable[[nn.Module], Any]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.BatchNorm1d(3), nn.Linear(3, 2))


BATCHES = list(torch.ones(2, 4, 3).cumsum(1) + torch.eye(4)[:, :3])


def once(module: nn.Module, **options: Any) -> Any:
    from lightning_bn import recalibrate

    return recalibrate(module, BATCHES, progress=False, **options)


def state(module: nn.Module) -> tuple[Any, ...]:
    """Return all that a call may not leave changed."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        [part.training for part in module.modules()],
        [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in module.modules()],
        [(part.momentum, part.track_running_stats) for part in module.modules() if isinstance(part, nn.BatchNorm1d)],
        torch.get_rng_state().tolist(),
        signal.getsignal(signal.SIGINT),
        sys.unraisablehook,
        [value.tolist() for value in module.state_dict().values()],
    )


def stress(call: Call, calls: int) -> tuple[int, list[str]]:
    """Return how many of the calls an interrupt ended, and what was wrong after which."""
    with lost_interrupts_unreported():
        return _stress(call, calls)


@contextmanager
def lost_interrupts_unreported() -> Iterator[None]:
    """An interrupt between two calls may come while Python collects garbage, where it can't be raised: no fault of a
    call."""
    report = sys.unraisablehook

    def report_others(lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            report(lost)

    sys.unraisablehook = report_others
    try:
        yield
    finally:
        sys.unraisablehook = report


def _stress(call: Call, calls: int) -> tuple[int, list[str]]:
    module = model()
    before = state(module)
    call(module).rollback()  # a first call imports
    started = time.perf_counter()
    call(module).rollback()
    length = time.perf_counter() - started
    delays, ended, wrong = random.Random(0), 0, []
    for number in range(calls):
        report, kind = None, "no interrupt"
        delay = delays.uniform(0, 1.3 * length)
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            started = time.perf_counter()
            report = call(module)
            length = time.perf_counter() - started  # it changes with what else the machine does
            timer.join()
            _ = [None for _ in range(100)]  # where it is heard, if it came after the call
        except KeyboardInterrupt:
            kind = "KeyboardInterrupt"
            ended += report is None
        except BaseException as error:
            kind = repr(error)
            wrong.append(f"call {number}: {kind}")
        timer.join()
        report = report or getattr(call, "report", None)
        if report is not None:
            report.rollback()
        if state(module) != before:
            parts = [place for place, pair in enumerate(zip(before, state(module), strict=True)) if pair[0] != pair[1]]
            wrong.append(
                f"call {number}: parts {parts} of the state differ, after {kind}, report: {report is not None}"
            )
            torch.set_grad_enabled(True)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            module = model()
            before = state(module)
    return ended, wrong


class Within:
    """The callback's own path, within a fit: what `BatchNormRecalibration` does after the last step."""

    def __init__(self) -> None:
        import lightning.pytorch as pl

        from lightning_bn import BatchNormRecalibration

        class Fitted(pl.LightningModule):
            def __init__(self, layers: nn.Module) -> None:
                super().__init__()
                self.layers = layers

            def forward(self, inputs: Tensor) -> Tensor:
                return self.layers(inputs)

            def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
                return self(batch).square().mean()

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=0.0)

        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        self.callback = BatchNormRecalibration()
        self.module = Fitted(model())
        self.trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[self.callback], **dict.fromkeys(quiet, False)
        )
        self.trainer.fit(self.module, DataLoader(torch.cat(BATCHES), 4))

    @property
    def report(self) -> Any:
        """What the callback has reported, also where an interrupt came after it."""
        return self.callback.report

    def __call__(self, module: nn.Module) -> Any:
        self.module.layers = module.train()
        self.callback.report = None
        self.callback._act(self.trainer, self.module)
        return self.callback.report


WAYS: dict[str, Callable[[], Call]] = {
    "recalibrate": lambda: once,
    # No `partial`: it is C code, and an interrupt as it returns would come before the caller has the report.
    "recalibrate, exact": lambda: lambda module: once(module, exact=True),
    "BatchNormRecalibration": Within,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--path", help="where to take the package from")
    options = parser.parse_args()
    if options.path:
        sys.path.insert(0, options.path)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    failed = False
    for name, way in WAYS.items():
        ended, wrong = stress(way(), options.calls)
        print(f"{name}: {ended} of {options.calls} calls ended by an interrupt, {len(wrong)} left something behind")
        print("".join(f"  {each}\n" for each in wrong[:5]), end="")
        failed = failed or bool(wrong)
    sys.exit(failed)


if __name__ == "__main__":
    main()
