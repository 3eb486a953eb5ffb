"""Whether the test of running statistics tells honest fits from mistakes: false alarms, mistakes found, and the harm.

Each situation is fitted on digits with several seeds. An evaluation is *harmed* if a recalibration from the training
images, with the weights that it evaluates, gains 5 points or more. The limit is the package's; each half of the seeds
is judged by itself.

    python benchmarks/fit_test.py [SEEDS]
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import ModeCheck, recalibrate

CODES = {"BN204", "BN207", "BN208"}
HARM = 0.05


def digits() -> tuple[TensorDataset, TensorDataset]:
    found = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(found.images, dtype=torch.float32)[:, None] / 8)[order]
    labels = torch.tensor(found.target)[order]
    return TensorDataset(images[:1397], labels[:1397]), TensorDataset(images[1397:], labels[1397:])


TRAIN, HELD_OUT = digits()


class Fit(pl.LightningModule):
    """A network of three batch norms; `weights` are multiplied for a validation by `factor`, as an exchange does."""

    def __init__(self, *, lr: float = 0.05, momentum: float = 0.1, factor: float = 1.0, scale: float = 1.0) -> None:
        super().__init__()
        self.lr, self.factor, self.scale = lr, factor, scale
        layers: list[nn.Module] = []
        for inside, outside in ((1, 16), (16, 32), (32, 32)):
            norm = nn.BatchNorm2d(outside, momentum=momentum)
            layers += [nn.Conv2d(inside, outside, 3, padding=1, bias=False), norm, nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))
        self.accuracy: list[tuple[float, float]] = []  # of each validation, and with recalibrated statistics

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def on_validation_start(self) -> None:
        self._multiply(self.factor)

    def on_validation_end(self) -> None:
        self._multiply(1 / self.factor)

    def _multiply(self, factor: float) -> None:
        for parameter in self.model.parameters():
            parameter.data.mul_(factor)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if batch_idx == 0:
            mended = copy.deepcopy(self.model)
            recalibrate(mended, [TRAIN.tensors[0]], layers="all", progress=False)
            self.accuracy.append((self._right(self.model), self._right(mended.eval())))
        self.model(batch[0] * self.scale)

    def _right(self, model: nn.Module) -> float:
        images, labels = HELD_OUT.tensors
        with torch.no_grad():
            return (model(images * self.scale).argmax(1) == labels).double().mean().item()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Reset(Fit):
    """One layer's statistics are reset before each validation."""

    def on_validation_start(self) -> None:
        self.model[4].reset_running_stats()


class Frozen(Fit):
    """The layers run in eval mode in training, with statistics that are not the data's."""

    def on_fit_start(self) -> None:
        for layer in self.model:
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
                layer.running_mean += 0.5  # type: ignore[operator]


def averaged(decay: float, **options: Any) -> Callable[[], list[pl.Callback]]:
    return lambda: [EMAWeightAveraging(decay=decay, **options)]


Situation = tuple[Callable[[], Fit], Callable[[], list[pl.Callback]], dict[str, Any]]
NONE: Callable[[], list[pl.Callback]] = list
HONEST: dict[str, Situation] = {
    "plain": (Fit, NONE, {}),
    "small rate": (lambda: Fit(lr=0.002), NONE, {}),
    "large rate": (lambda: Fit(lr=0.3), NONE, {}),
    "momentum 0.01": (lambda: Fit(momentum=0.02), NONE, {}),
    "batches of 8": (Fit, NONE, {"batch_size": 8}),
    "batches of 128": (Fit, NONE, {"batch_size": 128}),
    "EMA .9, buffers": (Fit, averaged(0.9, use_buffers=True), {}),
    "EMA .9, parameters": (Fit, averaged(0.9, use_buffers=False), {}),
    "eval mode in training": (Frozen, NONE, {}),
    "darker images": (lambda: Fit(scale=0.3), NONE, {}),
}
MISTAKES: dict[str, Situation] = {
    "weights times 2": (lambda: Fit(factor=2.0), NONE, {}),
    "weights times 4": (lambda: Fit(factor=4.0), NONE, {}),
    "EMA .999, buffers": (Fit, averaged(0.999, use_buffers=True), {}),
    "EMA .99, parameters, large rate": (lambda: Fit(lr=0.2), averaged(0.99, use_buffers=False), {}),
    "momentum 0.001": (lambda: Fit(momentum=0.001), NONE, {}),
    "one layer reset": (Reset, NONE, {}),
}


def judged(situation: Situation, seed: int) -> tuple[bool, bool]:
    """Return whether anything above information was said of the fit, and whether any of its evaluations was harmed."""
    make, callbacks, loader = situation
    torch.manual_seed(seed)
    module, check = make(), ModeCheck(action="log")
    trainer = pl.Trainer(
        max_epochs=3, callbacks=[*callbacks(), check], num_sanity_val_steps=0, logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    train = DataLoader(TRAIN, **{"batch_size": 32, "shuffle": True, **loader})
    trainer.fit(module, train, DataLoader(HELD_OUT, 100))
    said = any(each.code in CODES and each.level != "info" for each in check.findings)
    harmed = any(mended - own >= HARM for own, mended in module.accuracy)
    return said, harmed


def main(seeds: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| situation | said | harmed | of fits |\n|---|---:|---:|---:|")
    for title, situations in (("honest", HONEST), ("mistake", MISTAKES)):
        halves = ([0, 0, 0], [0, 0, 0])
        for name, situation in situations.items():
            found = [judged(situation, seed) for seed in range(seeds)]
            print(
                f"| {title}: {name} | {sum(s for s, _ in found)} | {sum(h for _, h in found)} | {seeds} |", flush=True
            )
            for seed, (told, lost) in enumerate(found):
                half = halves[seed % 2]
                half[0] += told and not lost
                half[1] += told and lost
                half[2] += lost
        for number, (alarms, hits, harmed_fits) in enumerate(halves, 1):
            print(f"| {title}, half {number}: unharmed and said {alarms}; harmed and said {hits} of {harmed_fits} ||||")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
