"""What ModeCheck adds to a training step: where the host is the bottleneck, as on a GPU, and where the device is.

Two copies of a network, one with the callback's hooks, take steps in turn, in this one run. Host-bound: a bottleneck
ResNet with 52 batch norms, 16 channels wide, and batches of 2 images, so that all that is left of a step is what Python
and torch do to launch it. Once with batches that are alike, where the hooks on the layers rest, and once with batches
of 2 and 3 images in turn, where they never do.

Of a step of ResNet-18 with large batches half a percent drowns in the noise, so it is also had otherwise: the same
layers, two channels wide, have the same hooks and hardly any work to hide them. There the difference between the two
copies, checks and all, is the callback's whole cost in time, to be divided by the full step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from resnet import resnet18
from torch import Tensor, nn
from tqdm import trange

from lightning_bn import ModeCheck

EVERY = 50  # Lightning's default of log_every_n_steps


class ResNet18(pl.LightningModule):
    """ResNet-18 with the stem for small images, its four stages `width` to 8 times `width` channels wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = resnet18(width)


class Bottleneck(nn.Module):
    """The bottleneck block of He et al. (2016), figure 5 right, with the stride in its middle."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(inner)) + self.shortcut(x))


class HostBound(pl.LightningModule):
    """3, 4, 6 and 3 bottlenecks as in ResNet-50, all of one width: 52 batch norms and hardly any arithmetic."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        stem = [nn.Conv2d(3, 4 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(4 * width), nn.ReLU()]
        strides = [
            2 if stage and not block else 1 for stage, blocks in enumerate((3, 4, 6, 3)) for block in range(blocks)
        ]
        blocks = [Bottleneck(4 * width, width, stride) for stride in strides]
        self.model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def steps(module: pl.LightningModule, size: int, batch_sizes: Sequence[int], *, checked: bool) -> Callable[[], None]:
    """Return a training step of `batch_sizes` in turn, inside the callback's hooks where `checked`."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    batches = cycle([(torch.randn(images, 3, size, size), torch.randint(10, (images,))) for images in batch_sizes])
    check = ModeCheck(action="log")
    # What of a Trainer the hooks read.
    trainer: Any = SimpleNamespace(
        global_step=0, log_every_n_steps=EVERY, loggers=[], world_size=1, accumulate_grad_batches=1
    )
    trainer.num_training_batches, trainer.fit_loop = 100_000, None
    if checked:
        check.on_fit_start(trainer, module)
        check.on_train_epoch_start(trainer, module)

    def step() -> None:
        images, labels = next(batches)
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


def in_turn(
    build: Callable[[], pl.LightningModule], size: int, batch_sizes: Sequence[int], rounds: int, times: int, name: str
) -> list[tuple[float, float]]:
    """Return the seconds a step of the plain and of the checked copy, round by round; who goes first changes each
    time."""
    copies = [steps(build(), size, batch_sizes, checked=checked) for checked in (False, True)]
    for step in copies:
        seconds(step, 4)
    taken = []
    for number in trange(rounds, desc=name, leave=False):
        order = (0, 1) if number % 2 else (1, 0)
        times_by_copy = {place: seconds(copies[place], times) for place in order}
        taken.append((times_by_copy[0], times_by_copy[1]))
    return taken


def ratio_of(taken: list[tuple[float, float]]) -> float:
    return statistics.median(checked / plain for plain, checked in taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=32)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    # A round is as long as from one check to the next, so that each has its share of everything.
    few = options.rounds // 3
    alike = in_turn(HostBound, 32, [2], few, EVERY, "host-bound, batches alike")
    unlike = in_turn(HostBound, 32, [2, 3], few, EVERY, "host-bound, batches never alike")
    print(f"Host-bound step, median of {few} rounds of {EVERY} steps, one thread, CPU time\n")
    print("| | step | with ModeCheck / without |\n|---|---:|---:|")
    for name, taken in (("batches alike", alike), ("batches never alike", unlike)):
        print(f"| {name} | {statistics.median(plain for plain, _ in taken) * 1e3:.1f} ms | {ratio_of(taken):.4f} |")

    whole = in_turn(lambda: ResNet18(64), 32, [options.batch_size], options.rounds, 1, "ResNet-18")
    thin = in_turn(lambda: ResNet18(2), 16, [4], few, EVERY, "the same layers, thin")
    step = statistics.median(plain for plain, _ in whole)
    cost = statistics.median(checked - plain for plain, checked in thin)
    print(
        f"\nResNet-18, batch {options.batch_size} of 3x32x32, one thread, CPU time, a look at the values every {EVERY} "
        f"steps\n"
    )
    print("| | share of the step |\n|---|---:|")
    print(f"| step with ModeCheck / without, median of {len(whole)} rounds | {ratio_of(whole):.4f} |")
    print(f"| all that ModeCheck does, {cost * 1e6:.0f} us, / step without | {cost / step:.2%} |")


if __name__ == "__main__":
    main()
