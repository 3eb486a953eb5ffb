"""Programs with a mistake each, and the printed fix applied where it says that it goes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning, WeightAveraging
from tiny_runs import Block, Module, Net, quiet, trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lightning_bn
from lightning_bn import Finding, Fix, ModeCheck

NAMES: dict[str, Any] = {name: getattr(lightning_bn, name) for name in lightning_bn.__all__} | {
    "nn": nn,
    "torch": torch,
}


def dataset(samples: int = 96) -> TensorDataset:
    """Two classes that a tiny network learns: noise on top of a bright left or right half."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % 2
    images = torch.randn(samples, 1, 6, 6, generator=generator)
    images[labels == 0, :, :, :3] += 1.5
    images[labels == 1, :, :, 3:] += 1.5
    return TensorDataset(images, labels)


BATCHES = [images for images, _ in DataLoader(dataset(), 16)]


class Fixed:
    """What a printed fix comes to, once it is applied where it says that it goes."""

    def __init__(self, fix: Fix | None) -> None:
        self.fix = fix
        self.text = "" if fix is None else str(fix).split("  # ")[0]

    def at(self, place: str, module: nn.Module) -> None:
        """Run the statement, if it goes here."""
        if self.fix is not None and self.fix.place == place and "=..." not in self.text:
            exec(self.text, NAMES | {"self": module, "batches": BATCHES})

    def around(self, module: nn.Module) -> Any:
        """The context manager, if there is one."""
        if self.fix is None or self.fix.place != "around that forward":
            return nullcontext()
        return eval(self.text.removeprefix("with ").removesuffix(":"), NAMES | {"self": module, "batches": BATCHES})

    def arguments(self, place: str) -> dict[str, Any]:
        """The arguments of a call; `...` stands for what is in a list already."""
        if self.fix is None or self.fix.place != place:
            return {}
        return eval(f"dict({self.text})", NAMES)


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


def run(program: Callable[[Fixed], Program], fix: Fix | None = None, **options: Any) -> tuple[list[Finding], float]:
    """Fit, and return the findings and the loss of the last validation, or of the module after training where the fix
    goes there."""
    torch.manual_seed(1)
    fixed, at_the_end = Fixed(fix), options.pop("at_the_end", False)
    module = program(fixed)
    fixed.at("before fit", module)
    callbacks = [make() for make in options.pop("callbacks", ())]
    arguments = fixed.arguments("in the Trainer")
    callbacks += [each for each in arguments.pop("callbacks", []) if each is not ...]
    loader = {"batch_size": 16, **options.pop("loader", {}), **fixed.arguments("in the training DataLoader")}
    check = ModeCheck(action="log")
    raises = (
        pytest.raises(ValueError, match="more than 1 value per channel")
        if options.pop("raises", False) and not fix
        else nullcontext()
    )
    fit = DataLoader(options.pop("data", dataset()), **loader), DataLoader(dataset(), 48)
    with quiet(), raises:
        trainer(*callbacks, check, **{"max_epochs": 10, **options, **arguments}).fit(module, *fit)
    if not at_the_end:
        return check.findings, sum(module.judged.values())
    fixed.at("after training", module)
    with torch.no_grad():
        images, labels = dataset().tensors
        return check.findings, F.cross_entropy(module.eval()(images), labels).item()


# The programs.


def eval_before_fit(fixed: Fixed) -> Program:
    module = pretrained(Program(fixed))
    module.model.backbone.requires_grad_(False)
    module.eval()
    return module


def backbone_in_eval(fixed: Fixed) -> Program:
    module = Program(fixed)
    module.model.backbone.eval()
    return module


def all_in_eval_with_a_frozen_backbone(fixed: Fixed) -> Program:
    module = pretrained(Program(fixed))
    module.model.backbone.requires_grad_(False)
    module.model.eval()
    return module


class Forgets(Program):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.model.eval()
        self(batch[0])
        self.fixed.at("at the end of the training step", self)
        return loss


class WritesInValidation(Program):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.fixed.fix is None:
            self.train()
        self.fixed.at("at the start of the evaluation step", self)
        super().validation_step(batch, batch_idx)


class RestoresNothing(Program):
    def on_validation_model_train(self) -> None:
        self.fixed.at("instead of the override of on_validation_model_train", self)


class ForwardsWithoutGrad(Program):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad(), self.fixed.around(self):
            self(batch[0] * 10)
        return self.loss(batch)


class ForwardsBetween(Program):
    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad(), self.fixed.around(self):
            self(torch.randn(16, 1, 6, 6) * 10)


def pretrained(module: Program) -> Program:
    """Give all layers the statistics of the data, as a pretrained network has them."""
    lightning_bn.recalibrate(module.model, BATCHES, layers="all", progress=False)
    return module


def frozen_backbone(fixed: Fixed) -> Program:
    module = pretrained(Program(fixed))
    module.model.backbone.requires_grad_(False)
    return module


class Interleaved(nn.Module):
    """A frozen backbone in the same container as a head with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(Block(1, 4), Block(4, 4), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 2))
        for block in self.parts[:2]:
            block.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.parts(images)


class LeftOut(Program):
    """The optimizer gets the head alone."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.head.parameters(), lr=0.1)


class Checkpointed(Net):
    def forward(self, images: Tensor) -> Tensor:
        return self.head(checkpoint(self.backbone, images, use_reentrant=False))


class CountsTwice(Program):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        with self.fixed.around(self):
            self(batch[0])
        return loss


class NotFinite(Program):
    def on_fit_start(self) -> None:
        if self.fixed.fix is None:
            self.model.head[2].running_mean[1] = float("nan")


class MeanTeacher(Program):
    """A teacher whose weights are averaged and whose buffers are not: in eval mode, or read by validation alone."""

    def __init__(self, fixed: Fixed, *, in_training: bool) -> None:
        super().__init__(fixed)
        self.teacher = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.in_training = in_training

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        answer = self(batch[0])
        loss = F.cross_entropy(answer, batch[1])
        if self.in_training:
            with torch.no_grad():
                target = self.teacher(batch[0]).softmax(1)
            loss = loss + 0.1 * F.mse_loss(answer.softmax(1), target)
        return loss

    def on_before_zero_grad(self, optimizer: Any) -> None:
        with torch.no_grad():
            for mine, other in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
                mine.lerp_(other, 0.5)
            self.fixed.at("after the teacher's weights are averaged", self)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.judged[batch_idx] = F.cross_entropy(self.teacher(batch[0]), batch[1]).item()


class SwapsInStep(Program):
    """Exchanges the weights inside of validation_step, by .data as most libraries do."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        with torch.no_grad():
            saved = [parameter.data.clone() for parameter in self.parameters()]
            for parameter in self.parameters():
                parameter.data.mul_(1.5)
            with self.fixed.around(self):
                super().validation_step(batch, batch_idx)
            for parameter, value in zip(self.parameters(), saved, strict=True):
                parameter.data.copy_(value)


class SwapsBefore(Program):
    """Exchanges the weights in on_validation_model_eval."""

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.saved = [parameter.data.clone() for parameter in self.parameters()]
        for parameter in self.parameters():
            parameter.data.mul_(1.5)

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        for parameter, value in zip(self.parameters(), self.saved, strict=True):
            parameter.data.copy_(value)


class SwapsAtTheEnd(Program):
    def on_train_end(self) -> None:
        for parameter in self.parameters():
            parameter.data.mul_(1.5)


def momentum(value: float) -> Callable[[Fixed], Program]:
    def make(fixed: Fixed) -> Program:
        module = Program(fixed)
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.momentum = value
        return module

    return make


def wide(fixed: Fixed) -> Program:
    """48 channels, which 32 groups do not divide."""
    return Program(
        fixed, nn.Sequential(nn.Conv2d(1, 48, 3, bias=False), nn.BatchNorm2d(48), nn.Flatten(), nn.Linear(768, 2))
    )


class Freezes(BaseFinetuning):
    """Leaves track_running_stats=False to the backbone."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model.backbone, train_bn=False)

    def finetune_function(self, *_: Any) -> None:
        """Nothing is thawed."""


def with_bias(fixed: Fixed) -> Program:
    layers = nn.Conv2d(1, 4, 3, **fixed.arguments("where the model is built")), nn.BatchNorm2d(4), nn.ReLU()
    return Program(fixed, nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 2)))


def dropout_first(fixed: Fixed) -> Program:
    layers = nn.Flatten(), nn.Linear(36, 32, bias=False), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.ReLU()
    return Program(fixed, nn.Sequential(*layers, nn.Linear(32, 2)))


PROGRAMS: dict[str, tuple[str, Callable[[Fixed], Program], dict[str, Any]]] = {
    "a module in eval mode with a frozen backbone": ("BN101", eval_before_fit, {}),
    "a backbone in eval mode": ("BN102", backbone_in_eval, {}),
    "model.eval() over a frozen backbone and a new head": ("BN102", all_in_eval_with_a_frozen_backbone, {}),
    "eval mode forgotten in the step": ("BN103", Forgets, {}),
    "train mode in validation": ("BN104", WritesInValidation, {}),
    "a hook that restores nothing": ("BN105", RestoresNothing, {}),
    "a forward under no_grad": ("BN106", ForwardsWithoutGrad, {}),
    "a forward between batches": ("BN107", ForwardsBetween, {}),
    "a frozen backbone beside a new head": ("BN201", frozen_backbone, {}),
    "frozen blocks in the container of the head": (
        "BN201",
        lambda fixed: pretrained(Program(fixed, Interleaved())),
        {},
    ),
    "a backbone that no optimizer holds": ("BN201", lambda fixed: pretrained(LeftOut(fixed)), {}),
    "activation checkpointing": ("BN202", lambda fixed: Program(fixed, Checkpointed()), {}),
    "a batch that counts twice": ("BN202", CountsTwice, {}),
    "a NaN": ("BN203", NotFinite, {}),
    "averaged weights": ("BN207", Program, {"callbacks": [lambda: WeightAveraging(use_buffers=False)]}),
    "weights exchanged in the step": ("BN207", SwapsInStep, {}),
    "weights exchanged in on_validation_model_eval": ("BN207", SwapsBefore, {}),
    "weights exchanged in on_train_end": ("BN207", SwapsAtTheEnd, {"at_the_end": True}),
    "a slow average": ("BN208", momentum(0.001), {}),
    "a teacher in eval mode": ("BN209", lambda fixed: MeanTeacher(fixed, in_training=True), {}),
    "a copy that validation alone reads": ("BN209", lambda fixed: MeanTeacher(fixed, in_training=False), {}),
    "momentum 0": ("BN301", momentum(0.0), {}),
    "batches of one": ("BN302", wide, {"loader": {"batch_size": 1}, "max_epochs": 1}),
    "a last batch of one": ("BN302", Program, {"data": dataset(97), "raises": True}),
    "BaseFinetuning.freeze(train_bn=False)": (
        "BN205",
        lambda fixed: pretrained(Program(fixed)),
        {"callbacks": [Freezes]},
    ),
    "a bias": ("BN303", with_bias, {}),
    "accumulated batches": ("BN304", Program, {"accumulate_grad_batches": 3}),
    "dropout before a batch norm": ("BN305", dropout_first, {"at_the_end": True}),
    "bfloat16 with a small momentum": ("BN206", momentum(0.01), {"precision": "bf16-true", "max_epochs": 4}),
}
