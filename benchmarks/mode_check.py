"""What ModeCheck adds to a training step of ResNet-18.

Two copies of the network, one with the callback's hooks, take steps in turn, in this one run. A share of half a percent drowns in the
noise of a step, so it is also had otherwise: the same layers, two channels wide, have the same hooks and hardly any work to hide them.
There the difference between the two copies, checks and all, is the callback's whole cost in time, to be divided by the full step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from resnet import resnet18
from tqdm import trange

from lightning_bn import ModeCheck

EVERY = 50  # Lightning's default of log_every_n_steps


class ResNet18(pl.LightningModule):
    """ResNet-18 with the stem for small images, its four stages `width` to 8 times `width` channels wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = resnet18(width)


def steps(width: int, size: int, batch_size: int, *, checked: bool) -> Callable[[], None]:
    """Return a training step, inside the callback's hooks where `checked`."""
    module = ResNet18(width)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    images, labels = torch.randn(batch_size, 3, size, size), torch.randint(10, (batch_size,))
    check = ModeCheck(action="log")
    # What of a Trainer the hooks read.
    trainer: Any = SimpleNamespace(global_step=0, log_every_n_steps=EVERY, loggers=[], world_size=1, accumulate_grad_batches=1)
    if checked:
        check.on_fit_start(trainer, module)
        check.on_train_epoch_start(trainer, module)

    def step() -> None:
        if checked:
            check.on_train_batch_start(trainer, module, None, trainer.global_step)
        loss = F.cross_entropy(module.model(images), labels)
        if checked:
            check.on_before_backward(trainer, module, loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if checked:
            check.on_train_batch_end(trainer, module, None, None, trainer.global_step)
        trainer.global_step += 1

    return step


def seconds(step: Callable[[], None], times: int = 1) -> float:
    # Of this process on its one thread, not by the clock: what else the machine does is not the callback's.
    started = time.process_time()
    for _ in range(times):
        step()
    return (time.process_time() - started) / times


def in_turn(width: int, size: int, batch_size: int, rounds: int, times: int, name: str) -> list[tuple[float, float]]:
    """Return the seconds a step of the plain and of the checked copy, round by round; who goes first changes each time."""
    copies = [steps(width, size, batch_size, checked=checked) for checked in (False, True)]
    for step in copies:
        seconds(step, 3)
    taken = []
    for number in trange(rounds, desc=name, leave=False):
        order = (0, 1) if number % 2 else (1, 0)
        times_by_copy = {place: seconds(copies[place], times) for place in order}
        taken.append((times_by_copy[0], times_by_copy[1]))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=32)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    whole = in_turn(64, 32, options.batch_size, options.rounds, 1, "ResNet-18")
    # A round is as long as from one check to the next, so that each has its share of everything.
    thin = in_turn(2, 16, 4, options.rounds // 3, EVERY, "the same layers, thin")
    step = statistics.median(plain for plain, _ in whole)
    ratio = statistics.median(checked / plain for plain, checked in whole)
    cost = statistics.median(checked - plain for plain, checked in thin)
    print(f"ResNet-18, batch {options.batch_size} of 3x32x32, one thread, CPU time, a look at the values every {EVERY} steps\n")
    print("| | share of the step |\n|---|---:|")
    print(f"| step with ModeCheck / without, median of {len(whole)} rounds | {ratio:.4f} |")
    print(f"| all that ModeCheck does, {cost * 1e6:.0f} us, / step without | {cost / step:.2%} |")


if __name__ == "__main__":
    main()
