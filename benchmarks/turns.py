"""Training steps, also of a real Trainer, timed in turn, so that whatever else the machine does meets all alike."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from tqdm import tqdm

Step = Callable[[], object]
ENDLESS = 10**9


def ratios(steps: dict[str, Step], device: str, rounds: int, repeat: int) -> dict[str, float]:
    """Return for each step the median, over the rounds, of its time relative to the first one's in the same round.

    In each round every step is run `repeat` times in a row; another one begins each time.
    """
    names, seconds = list(steps), {name: [] for name in steps}  # type: dict[str, list[float]]
    for number in tqdm(range(rounds + 1), unit="round", leave=False):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            spent = _seconds(steps[name], device, repeat)
            if number:  # the first round warms up
                seconds[name].append(spent)
    first = seconds[names[0]]
    return {name: statistics.median(a / b for a, b in zip(each, first, strict=True)) for name, each in seconds.items()}


def _seconds(step: Step, device: str, repeat: int) -> float:
    # On the CPU, time of this process on its one thread: what other processes do is no cost of the step.
    # An accelerator works while the process goes on, so there the clock counts, from an idle device to an idle one.
    clock = time.process_time if device == "cpu" else time.perf_counter
    _wait(device)
    started = clock()
    for _ in range(repeat):
        step()
    _wait(device)
    return clock() - started


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def training_step(model: nn.Module, device: str, images: Tensor) -> Step:
    """Return forward, backward and a step of SGD, in a loop of one's own."""
    model.to(device).train()
    batch, labels = images.to(device), torch.zeros(len(images), dtype=torch.int64, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        F.cross_entropy(model(batch), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Module(pl.LightningModule):
    """What `training_step` does, for a Trainer. The validation is never reached, but some callbacks demand one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, images: Tensor) -> Tensor:
        return F.cross_entropy(self.model(images), torch.zeros(len(images), dtype=torch.int64, device=images.device))

    def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
        return self.loss(images)

    def validation_step(self, images: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(images))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Repeated(Sequence[Tensor]):
    """A loader that gives one batch again and again."""

    def __init__(self, batch: Tensor) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: Any) -> Tensor:
        return self.batch


class _Turn(pl.Callback):
    """Hand over to whoever asked for a step, each time a batch begins."""

    def on_train_batch_start(self, *args: Any) -> None:
        getcurrent().parent.switch()


@contextmanager
def trainer_step(model: nn.Module, device: str, images: Tensor, *callbacks: pl.Callback) -> Iterator[Step]:
    """Yield a step of a real Trainer that fits `model`: from the start of a batch to the start of the next one."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with TemporaryDirectory() as folder:  # for the monitor's table
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few workers
            trainer = pl.Trainer(
                accelerator="cpu" if device == "cpu" else "auto",
                devices=1,
                max_epochs=1,
                default_root_dir=folder,
                num_sanity_val_steps=0,
                callbacks=[_Turn(), *callbacks],
                **quiet,
            )
            # A greenlet, which stops within the fit and goes on there: threads would each have modes of torch of their
            # own.
            fit = greenlet(lambda: trainer.fit(Module(model), Repeated(images), Repeated(images)))
            fit.switch()
        if fit.dead:
            raise RuntimeError("the Trainer ended before its first batch")
        try:
            yield fit.switch
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fit.throw()  # GreenletExit: the Trainer tears down
