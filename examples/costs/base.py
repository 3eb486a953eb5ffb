"""What the programs share: a registry, how one is run, and networks to begin with."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from digits import Classifier, ConvNet, digits, fit, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import Finding, ModeCheck

Batch = tuple[Tensor, Tensor]
Loader = DataLoader[tuple[Tensor, ...]]


class Setting(NamedTuple):
    """Which run of a program it is."""

    seed: int
    """Of the split of the data, of their order and of the initial weights."""
    epochs: int


class Outcome(NamedTuple):
    """What a run of a program gave."""

    accuracy: float
    """Of the last validation, in percent."""
    findings: list[Finding]


class Mistake(NamedTuple):
    """A rule's code, what the mistake is, and the program with it and, ``mend=True``, without."""

    code: str
    what: str
    run: Callable[[Setting, bool], Outcome]


MISTAKES: list[Mistake] = []
"""All of them, in the order of their programs."""


def mistake(code: str, what: str, **arguments: Any) -> Callable[[Any], Any]:
    """Register a program ``(setting, mend)``, to be called with `arguments`; of several, the one next to ``def`` is the
    first."""

    def register(program: Any) -> Any:
        MISTAKES.append(Mistake(code, what, functools.partial(program, **arguments)))
        return program

    return register


def train(
    module: Classifier,
    setting: Setting,
    *callbacks: pl.Callback,
    batch_size: int = 32,
    training: Loader | None = None,
    validation: Loader | None = None,
    **options: Any,
) -> Outcome:
    """Fit `module` to the digits next to `callbacks`, by a Trainer of `options`."""
    own = digits(batch_size, seed=setting.seed)
    check = ModeCheck(action="log")
    options = {"epochs": setting.epochs, "callbacks": [*callbacks, check], **options}
    fit(module, training or own[0], validation or own[1], **options)
    return Outcome(accuracy_of(module), check.findings)


def validate(module: Classifier, setting: Setting) -> Outcome:
    """Validate `module`, after or instead of a fit."""
    check = ModeCheck(action="log")
    with contextlib.redirect_stdout(io.StringIO()):
        quiet_trainer(0, [check]).validate(module, digits(seed=setting.seed)[1], verbose=False)
    return Outcome(accuracy_of(module), check.findings)


def accuracy_of(module: pl.LightningModule) -> float:
    """Return the accuracy that the last validation logged, in percent."""
    return 100 * float(module.trainer.callback_metrics["val_acc"])


def with_momentum(model: ConvNet, momentum: float) -> ConvNet:
    for norm in norms(model):
        norm.momentum = momentum
    return model


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]


def blocks(model: nn.Module) -> list[Any]:
    """Return all of a `ConvNet` but its head: sequences of a convolution, a norm and a ReLU."""
    return [part for part in model.children() if isinstance(part, nn.Sequential)]


def set_modes(model: nn.Module, training: bool) -> None:
    """Put all but the head of a `ConvNet` into a mode."""
    for block in blocks(model):
        block.train(training)


def features(model: nn.Module, images: Tensor) -> Tensor:
    """Return what a `ConvNet`'s head gets."""
    for part in list(model.children())[:-1]:
        images = part(images)
    return images


class Inverted(Classifier):
    """Sees the images with black and white exchanged."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(1 - images)


def pretrained(setting: Setting, kind: type[Classifier] = Inverted) -> ConvNet:
    """Return a network that was trained for an epoch by `kind`."""
    with torch.random.fork_rng():
        return copy.deepcopy(_pretrained(setting.seed, kind))


@functools.lru_cache(maxsize=4)
def _pretrained(seed: int, kind: type[Classifier]) -> ConvNet:
    model = ConvNet()
    fit(kind(model), digits(seed=seed)[0], epochs=1)
    return model
