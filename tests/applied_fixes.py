"""Fits of a program with a mistake, as it is and with a printed fix applied where the message says that it goes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from fitting import quiet, trainer
from small_models import Module
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bn
from lightning_bn import Finding, ModeCheck

FIX = "  fix:   "
"""How the line of a message begins that says what to do."""

NAMES: dict[str, Any] = {name: getattr(lightning_bn, name) for name in lightning_bn.__all__} | {
    "nn": nn,
    "torch": torch,
}


def dataset(samples: int = 96, seed: int = 0) -> TensorDataset:
    """Two classes that a tiny network learns: noise on top of a bright left or right half."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 2
    images = torch.randn(samples, 1, 6, 6, generator=generator)
    images[labels == 0, :, :, :3] += 1.5
    images[labels == 1, :, :, 3:] += 1.5
    return TensorDataset(images, labels)


BATCHES = [images for images, _ in DataLoader(dataset(), 16)]

HELD_OUT = dataset(seed=1)
"""What no fit has seen: the loss is that of an evaluation on it."""


class Fixed:
    """The fix that a message prints, for a program to apply where the message says that it goes."""

    def __init__(self, finding: Finding | None = None) -> None:
        line = next((line for line in str(finding).splitlines() if line.startswith(FIX)), FIX)
        self.text, _, remark = line.removeprefix(FIX).partition("  # ")
        self.place = remark.partition("; ")[0]

    def at(self, place: str, module: nn.Module) -> None:
        """Run the statement, if it goes here."""
        if self.place == place:
            exec(self.text, NAMES | {"self": module, "batches": BATCHES})

    def around(self, module: nn.Module) -> Any:
        """The context manager, if there is one."""
        if self.place != "around that forward":
            return nullcontext()
        return eval(self.text.removeprefix("with ").removesuffix(":"), NAMES | {"self": module, "batches": BATCHES})

    def arguments(self, place: str) -> dict[str, Any]:
        """The arguments of a call; `...` stands for what is in a list already."""
        return eval(f"dict({self.text})", NAMES) if self.place == place else {}


class Program(Module):
    """A program with a mistake; the places where a fix may go are marked by `self.fixed`."""

    def __init__(self, fixed: Fixed, model: nn.Module | None = None) -> None:
        super().__init__(model)
        self.fixed = fixed
        self.judged: dict[int, float] = {}  # the losses of the last validation

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.judged[batch_idx] = self.loss(batch).item()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Run(NamedTuple):
    """What came of a fit."""

    findings: list[Finding]
    """What was said in it; where a fix goes behind the training, in an evaluation after that."""
    loss: float
    """Of the last evaluation, on data held out."""


def run(program: Callable[[Fixed], Program], mended: Finding | None = None, *, seed: int = 0, **options: Any) -> Run:
    """Fit with a validation after each epoch, and with the fix of the finding `mended`; evaluate once more where
    fix or mistake go behind the training."""
    torch.manual_seed(seed)
    fixed = Fixed(mended)
    module = program(fixed)
    fixed.at("before fit", module)
    callbacks = [make() for make in options.pop("callbacks", ())]
    arguments = fixed.arguments("in the Trainer")
    callbacks += [each for each in arguments.pop("callbacks", []) if each is not ...]
    loader = {"batch_size": 16, **options.pop("loader", {}), **fixed.arguments("in the training DataLoader")}
    raises, at_the_end = options.pop("raises", False) and mended is None, options.pop("at_the_end", False)
    stops = pytest.raises(ValueError, match="more than 1 value per channel") if raises else nullcontext()
    train = DataLoader(options.pop("data", dataset()), **loader)
    held_out = DataLoader(options.pop("held_out", HELD_OUT), 48)
    check, afterwards = ModeCheck(action="log"), ModeCheck(action="log")
    with quiet(), stops:
        trainer(*callbacks, check, **{"max_epochs": 5, **options, **arguments}).fit(module, train, held_out)
    if at_the_end:
        fixed.at("after training", module)
        with quiet():
            trainer(afterwards).validate(module, held_out, verbose=False)
    told = afterwards if at_the_end and mended is not None else check
    return Run(told.findings, sum(module.judged.values()) / len(module.judged))
