"""Whether BN204, BN207 and BN208 are silent of honest fits: forty programs, of which none was used to choose a limit.

Each is fitted on digits with several seeds. Where one of the rules speaks above information, what the evaluation loses
is printed: what a recalibration with the weights that it evaluates would gain on images held out, in points. A fit that
loses by plain lag is to be spoken of; one that loses nothing is a false alarm.

    python benchmarks/honest_fits.py [SEEDS] [FIRST PROGRAM] [LAST PROGRAM]
"""

from __future__ import annotations

import copy
import logging
import math
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from fit_test import network, right
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging, StochasticWeightAveraging
from schedulefree import SGDScheduleFree
from split_digits import HELD_OUT, TRAIN
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler

from lightning_bn import BatchNormRecalibration, FreezeBatchNorm, ModeCheck, Window, convert_batch_norm, recalibrate

CODES = ("BN204", "BN207", "BN208")
EPOCHS, STEPS = 4, 44


def norm(channels: int, **options: Any) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels, **options), nn.ReLU()]


def conv(inside: int, outside: int, groups: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, size, padding=size // 2, groups=groups, bias=False)


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10)]


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            conv(channels, channels), *norm(channels), conv(channels, channels), nn.BatchNorm2d(channels)
        )

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(images + self.branch(images))


class PreActivation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*norm(channels), conv(channels, channels))

    def forward(self, images: Tensor) -> Tensor:
        return images + self.branch(images)


class Dense(nn.Module):
    def __init__(self, inside: int, more: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*norm(inside), conv(inside, more))

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images, self.branch(images)], 1)


class Sequences(nn.Sequential):
    """Rows of the image as channels, columns as positions."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images[:, 0])


def three() -> nn.Module:
    return network("three norms", 0.1)


def residual(blocks: int = 3) -> nn.Module:
    return nn.Sequential(conv(1, 16), *norm(16), *[Residual(16) for _ in range(blocks)], *head(16))


def depthwise() -> nn.Module:
    blocks = [nn.Sequential(conv(16, 16, groups=16), *norm(16), conv(16, 16, size=1), *norm(16)) for _ in range(3)]
    return nn.Sequential(conv(1, 16), *norm(16), *blocks, *head(16))


def one_dimension() -> nn.Module:
    layers = [nn.Conv1d(8, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 16, 3), nn.BatchNorm1d(16)]
    return Sequences(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(96, 10))


def with_norms(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(conv(1, 16), *norm(16, **options), conv(16, 16), *norm(16, **options), *head(16))


def dropping() -> nn.Module:
    return nn.Sequential(conv(1, 16), *norm(16), conv(16, 16), *norm(16), nn.Dropout2d(0.1), *head(16))


def autoencoder() -> nn.Module:
    return nn.Sequential(conv(1, 8), *norm(8), conv(8, 8), *norm(8), nn.Conv2d(8, 1, 3, padding=1))


def mixed_norms() -> nn.Module:
    return nn.Sequential(conv(1, 16), *norm(16), conv(16, 16), nn.GroupNorm(4, 16), nn.ReLU(), *head(16))


class Fit(pl.LightningModule):
    """Trains `model` by `optimizer`, and keeps what each validation loses."""

    def __init__(self, model: nn.Module, optimizer: Callable[..., Any], schedule: Callable[..., Any] | None) -> None:
        super().__init__()
        self.model = model
        self.optimizer, self.schedule = optimizer, schedule
        self.losses: dict[int, float] = {}  # by the step of the validation

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if batch_idx == 0:
            mended = copy.deepcopy(self.model)
            recalibrate(mended, [TRAIN.tensors[0]], layers="all", progress=False)
            self.losses[self.global_step] = 100 * (right(mended.eval()) - right(self.model))
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([each for each in self.parameters() if each.requires_grad])
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


class Reconstructs(Fit):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[0])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if batch_idx == 0:
            self.losses[self.global_step] = math.nan  # no accuracy
        self.log("val_loss", F.mse_loss(self(batch[0]), batch[0]))


class Noisy(Fit):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images + 0.2 * torch.randn_like(images)), labels)


class Mixup(Fit):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (images, labels), share = batch, float(torch.rand(()) * 0.3)
        other = torch.randperm(len(images))
        answers = self(images.lerp(images[other], share))
        return (1 - share) * F.cross_entropy(answers, labels) + share * F.cross_entropy(answers, labels[other])


class TwoViews(Fit):
    """One forward of two views side by side."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        answers = self(torch.cat([images, images.roll(1, 3)]))
        return F.cross_entropy(answers, labels.repeat(2))


class Manual(Fit):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class KeptInEval(Fit):
    """The norms' statistics are kept while the rest learns, as in detectors, after two epochs as usual."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch >= 2:
            for layer in self.model.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.eval()


class Parts(Fit):
    """A backbone that a schedule thaws."""

    def __init__(self, model: nn.Module, *arguments: Any) -> None:
        super().__init__(nn.Sequential(), *arguments)
        layers = list(model)
        self.backbone, self.head = nn.Sequential(*layers[:-3]), nn.Sequential(*layers[-3:])
        self.model = nn.Sequential(self.backbone, self.head)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.head.parameters())


class ScheduleFree(Fit):
    def on_fit_start(self) -> None:
        self.optimizers().optimizer.train()

    def on_validation_start(self) -> None:
        self.optimizers().optimizer.eval()

    def on_validation_end(self) -> None:
        self.optimizers().optimizer.train()


class OwnAverage(Fit):
    """An average of the parameters, put in for each validation."""

    def on_fit_start(self) -> None:
        self.average = [each.detach().clone() for each in self.parameters()]

    def on_train_batch_end(self, *_: Any) -> None:
        torch._foreach_lerp_(self.average, [each.detach() for each in self.parameters()], 0.02)

    def _exchange(self) -> None:
        for mine, other in zip(self.parameters(), self.average, strict=True):
            mine.data, other.data = other.data, mine.data

    on_validation_epoch_start = on_validation_epoch_end = _exchange


def shuffled(batch_size: int = 32, **options: Any) -> DataLoader[Any]:
    return DataLoader(TRAIN, batch_size, **{"shuffle": True, **options})


def weighted() -> DataLoader[Any]:
    weights = [3.0 if int(label) < 5 else 1.0 for label in TRAIN.tensors[1]]
    return DataLoader(TRAIN, 32, sampler=WeightedRandomSampler(weights, len(weights)))


def sorted_by_class() -> DataLoader[Any]:
    return DataLoader(Subset(HELD_OUT, HELD_OUT.tensors[1].argsort().tolist()), 40)


def sgd(lr: float, **options: Any) -> Callable[..., Any]:
    return partial(SGD, lr=lr, **{"momentum": 0.9, **options})


def repaired(**options: Any) -> BatchNormRecalibration:
    return BatchNormRecalibration(when="validation", **options)


class Program(NamedTuple):
    network: Callable[[], nn.Module] = three
    optimizer: Callable[..., Any] = sgd(0.02)
    schedule: Callable[..., Any] | None = None
    module: type[Fit] = Fit
    callbacks: Callable[[], list[pl.Callback]] = list
    train: Callable[[], DataLoader[Any]] = shuffled
    val: Callable[[], DataLoader[Any]] = lambda: DataLoader(HELD_OUT, 100)
    trainer: dict[str, Any] = {}  # noqa: RUF012
    pretrained: bool = False


def warmup(optimizer: Any) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / STEPS))


def cosine(optimizer: Any) -> CosineAnnealingLR:
    return CosineAnnealingLR(optimizer, EPOCHS * STEPS)


def one_cycle(rate: float) -> Callable[..., Any]:
    return lambda optimizer: OneCycleLR(optimizer, rate, total_steps=EPOCHS * STEPS + 1)


PROGRAMS = {
    "residual, SGD, cosine": Program(residual, sgd(0.05), cosine),
    "residual, AdamW, one cycle": Program(residual, partial(AdamW, lr=1e-3), one_cycle(5e-3)),
    "pre-activation, Nesterov, warm-up": Program(
        lambda: nn.Sequential(conv(1, 16), *[PreActivation(16) for _ in range(3)], *norm(16), *head(16)),
        sgd(0.03, nesterov=True), warmup,
    ),
    "dense, Adam": Program(
        lambda: nn.Sequential(conv(1, 8), Dense(8, 8), Dense(16, 8), *norm(24), *head(24)), partial(Adam, lr=3e-3)
    ),
    "depthwise, RMSprop, steps": Program(depthwise, partial(RMSprop, lr=1e-3), lambda o: StepLR(o, 60, 0.3)),
    "depthwise, Adam, cosine": Program(depthwise, partial(Adam, lr=3e-3), cosine),
    "rows as sequences, Adam": Program(one_dimension, partial(Adam, lr=3e-3)),
    "vectors, SGD": Program(lambda: network("perceptron", 0.1), sgd(0.02)),
    "vectors, NAdam, batches of 64": Program(
        lambda: network("perceptron", 0.1), partial(NAdam, lr=3e-3), train=partial(shuffled, 64)
    ),
    "batch and group norm, Adagrad": Program(mixed_norms, partial(Adagrad, lr=0.02)),
    "no affine weights": Program(with_norms(affine=False)),
    "eps 1e-3, momentum 0.03": Program(with_norms(eps=1e-3, momentum=0.03), sgd(0.005)),
    "momentum 0.2": Program(with_norms(momentum=0.2)),
    "cumulative average": Program(with_norms(momentum=None), sgd(0.002)),
    "Window(10)": Program(lambda: convert_batch_norm(three(), Window(10))),
    "Window(40), AdamW, cosine": Program(
        lambda: convert_batch_norm(residual(2), Window(40)), partial(AdamW, lr=2e-3), cosine
    ),
    "dropout": Program(dropping),
    "weight decay 0.05": Program(three, partial(AdamW, lr=3e-3, weight_decay=0.05)),
    "noise in training": Program(module=Noisy),
    "mixup": Program(module=Mixup),
    "two views in one forward": Program(module=TwoViews),
    "manual optimization": Program(module=Manual),
    "autoencoder": Program(autoencoder, partial(Adam, lr=3e-3), module=Reconstructs),
    "batches of 4": Program(three, sgd(0.002), train=partial(shuffled, 4)),
    "batches of 16, last one dropped": Program(train=partial(shuffled, 16, drop_last=True)),
    "batches of 256": Program(three, sgd(0.05), train=partial(shuffled, 256), trainer={"max_epochs": 12}),
    "classes weighted in training": Program(train=weighted),
    "validation sorted by class": Program(val=sorted_by_class),
    "validation of one batch": Program(val=lambda: DataLoader(HELD_OUT, 400)),
    "two validations an epoch": Program(trainer={"val_check_interval": 0.5}),
    "gradients accumulated over 4": Program(three, sgd(0.05), trainer={"accumulate_grad_batches": 4}),
    "gradients clipped, bfloat16": Program(trainer={"gradient_clip_val": 0.5, "precision": "bf16-mixed"}),
    "fine-tuned, small rate": Program(residual, sgd(0.002), pretrained=True),
    "fine-tuned, norms kept by FreezeBatchNorm": Program(
        residual, sgd(0.01), callbacks=lambda: [FreezeBatchNorm("model")], pretrained=True
    ),
    "norms kept in eval mode after two epochs": Program(module=KeptInEval),
    "backbone thawed by a schedule": Program(
        residual, sgd(0.005), module=Parts, pretrained=True,
        callbacks=lambda: [BackboneFinetuning(2, initial_denom_lr=10.0, verbose=False)],
    ),
    "EMA .99, buffers not averaged, repaired": Program(
        callbacks=lambda: [EMAWeightAveraging(decay=0.99, use_buffers=False), repaired()]
    ),
    "SWA, repaired": Program(callbacks=lambda: [StochasticWeightAveraging(0.02, 2), BatchNormRecalibration()]),
    "schedule-free, repaired": Program(three, partial(SGDScheduleFree, lr=0.5), module=ScheduleFree,
                                       callbacks=lambda: [repaired()]),
    "average of one's own, repaired": Program(module=OwnAverage, callbacks=lambda: [repaired()]),
}  # fmt: skip


def fitted(program: Program, seed: int, *callbacks: pl.Callback, **options: Any) -> Fit:
    torch.manual_seed(seed)
    model = program.network()
    if program.pretrained:  # on the odd digits
        start = Fit(model, sgd(0.02), None)
        odd = Subset(TRAIN, (TRAIN.tensors[1] % 2).nonzero().flatten().tolist())
        trainer().fit(start, DataLoader(odd, 32, shuffle=True))
    module = program.module(model, program.optimizer, program.schedule)
    runner = trainer(callbacks=[*program.callbacks(), *callbacks], **{**program.trainer, **options})
    runner.fit(module, program.train(), program.val())
    return module


def trainer(**options: Any) -> pl.Trainer:
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(**{"max_epochs": EPOCHS, "accelerator": "cpu", "num_sanity_val_steps": 0, **silent, **options})


def said(program: Program, seed: int) -> tuple[int, list[tuple[str, float]]]:
    """Return how many validations there were, and what was said above information: the code and level, and the points
    that the validation lost; of the end of a fit, those of the last."""
    check = ModeCheck(action="log")
    losses = fitted(program, seed, check).losses
    found = [each for each in check.findings if each.code in CODES and each.level != "info"]
    return len(losses), [(f"{each.code} {each.level}", losses.get(each.step, [*losses.values()][-1])) for each in found]


def main(seeds: int = 3, first: int = 0, last: int = len(PROGRAMS)) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("| program | validations | spoken of, and the points that it loses |\n|---|---:|---|")
    validations, everything = 0, []
    for name, program in list(PROGRAMS.items())[first:last]:
        results = [said(program, seed) for seed in range(seeds)]
        number, found = sum(number for number, _ in results), [each for _, found in results for each in found]
        validations += number
        everything += found
        print(f"| {name} | {number} | {', '.join(f'{what}: {lost:.1f}' for what, lost in found)} |", flush=True)
    small = sum(lost < 2 for _, lost in everything)
    print(f"| **together** | {validations} | {len(everything)}, of which {small} lose less than 2 points |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
