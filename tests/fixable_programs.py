"""Programs with a mistake each, and whether it costs anything in a fit of a fifth of a second."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from applied_fixes import BATCHES, HELD_OUT, Fixed, Program, dataset
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging
from small_models import Block, Net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import lightning_bn


def eval_from_scratch(fixed: Fixed) -> Program:
    return Raw(fixed).eval()


def eval_before_fit(fixed: Fixed) -> Program:
    module = pretrained(Program(fixed))
    module.model.backbone.requires_grad_(False)
    module.eval()
    return module


class Raw(Program):
    """Images as they are stored, with a mean of many deviations, which the first batch norm takes away."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images + 10)


def backbone_in_eval(fixed: Fixed) -> Program:
    module = Raw(fixed)
    module.model.backbone.eval()
    return module


def all_in_eval_with_a_frozen_backbone(fixed: Fixed) -> Program:
    module = pretrained(Program(fixed))
    module.model.backbone.requires_grad_(False)
    module.model.eval()
    return module


class Forgets(Raw):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.model.eval()
        self(batch[0])
        self.fixed.at("at the end of the training step", self)
        return loss


class WritesInValidation(Program):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if not self.fixed.text:
            self.train()
        self.fixed.at("at the start of the evaluation step", self)
        super().validation_step(batch, batch_idx)


class RestoresNothing(Raw):
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


class SkipsNonfinite(Program):
    """Takes no step where the loss is not finite; the batch norms have taken the batch by then."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        return loss if loss.isfinite() else None


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
                parameter.data.mul_(3)
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
            parameter.data.mul_(3)

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        for parameter, value in zip(self.parameters(), self.saved, strict=True):
            parameter.data.copy_(value)


class SwapsAtTheEnd(Program):
    def on_train_end(self) -> None:
        for parameter in self.parameters():
            parameter.data.mul_(3)


def momentum(value: float, make: Callable[[Fixed], Program] = Program) -> Callable[[Fixed], Program]:
    def made(fixed: Fixed) -> Program:
        module = make(fixed)
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.momentum = value
        return module

    return made


def without_statistics(fixed: Fixed) -> Program:
    arguments = {"track_running_stats": False, **fixed.arguments("where the model is built")}
    layers = nn.Flatten(), nn.Linear(36, 8, bias=False), nn.BatchNorm1d(8, **arguments), nn.ReLU()
    return Program(fixed, nn.Sequential(*layers, nn.Linear(8, 2)))


class TwoTeachers(MeanTeacher):
    """Two copies in a list, one behind the other, of which validation takes the mean."""

    def __init__(self, fixed: Fixed) -> None:
        super().__init__(fixed, in_training=False)
        self.teachers = nn.ModuleList([self.teacher, copy.deepcopy(self.teacher)])
        del self.teacher

    def on_before_zero_grad(self, optimizer: Any) -> None:
        followed = self.model
        for teacher in self.teachers:
            with torch.no_grad():
                for mine, other in zip(teacher.parameters(), followed.parameters(), strict=True):
                    mine.lerp_(other, 0.5)
            followed = teacher
        self.fixed.at("after the teacher's weights are averaged", self)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        answer = torch.stack([teacher(batch[0]) for teacher in self.teachers]).mean(0)
        self.judged[batch_idx] = F.cross_entropy(answer, batch[1]).item()


class Contrasts(Program):
    """Each image has a contrast of its own."""

    def __init__(self, fixed: Fixed) -> None:  # 48 channels, which 32 groups do not divide
        layers = nn.Conv2d(1, 48, 3, bias=False), nn.BatchNorm2d(48), nn.AvgPool2d(2), nn.Flatten()
        super().__init__(fixed, nn.Sequential(*layers, nn.Linear(192, 2)))

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images * images[:, :, :1, :1].mul(2).exp())


class OwnNormInEvaluation(Program):
    """Evaluates with a batch norm of its own, as of clean images, which training never runs."""

    def __init__(self, fixed: Fixed) -> None:
        super().__init__(fixed, nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)))
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.norm, self.norm_of_clean = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        norm = self.norm if self.training else self.norm_of_clean
        return self.model(norm(self.conv(images + 10)))


class SensorOffInTraining(Program):
    """Images of two channels, the second of which is zero in all training data."""

    def __init__(self, fixed: Fixed) -> None:
        layers = nn.BatchNorm2d(2, momentum=0.9), nn.Conv2d(2, 8, 3, bias=False), nn.ReLU(), nn.Flatten()
        super().__init__(fixed, nn.Sequential(*layers, nn.Linear(128, 2)))

    def forward(self, images: Tensor) -> Tensor:
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
        second = torch.zeros_like(images) if self.training else noise
        return self.model(torch.cat((images, second), 1))


def by_class(data: TensorDataset) -> TensorDataset:
    """Class after class."""
    images, labels = data.tensors
    order = labels.argsort(stable=True)
    return TensorDataset(images[order], labels[order])


def with_infinity() -> TensorDataset:
    """One value of all is infinite."""
    data = dataset()
    data.tensors[0][37, 0, 2, 2] = float("inf")
    return data


class OtherImages(Program):
    """Images of eight times the contrast of those of the pretraining."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images * 8)


class Freezes(BaseFinetuning):
    """Leaves track_running_stats=False to the backbone."""

    def freeze_before_training(self, pl_module: Any) -> None:
        printed = pl_module.fixed.arguments("in the schedule's call of freeze")
        self.freeze(pl_module.model.backbone, **{"train_bn": False} | printed)

    def finetune_function(self, *_: Any) -> None:
        """Nothing is thawed."""


def with_bias(fixed: Fixed) -> Program:
    layers = nn.Conv2d(1, 4, 3, **fixed.arguments("where the model is built")), nn.BatchNorm2d(4), nn.ReLU()
    return Program(fixed, nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 2)))


def dropout_first(fixed: Fixed) -> Program:
    layers = nn.Flatten(), nn.Linear(36, 32, bias=False), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.ReLU()
    return Program(fixed, nn.Sequential(*layers, nn.Linear(32, 2)))


@dataclass(frozen=True)
class Mistake:
    """A program, the rule that names its mistake, and how it is fitted."""

    code: str
    program: Callable[[Fixed], Program]
    costs: bool
    """Whether it costs something in this fit, whatever the seed."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of `run`."""


SMALL = {"loader": {"batch_size": 4, "shuffle": True}, "max_epochs": 2}

PROGRAMS = {
    "a module in eval mode": Mistake("BN101", momentum(0.3, eval_from_scratch), True),
    "a module in eval mode with a frozen backbone": Mistake("BN101", eval_before_fit, False),
    "a backbone in eval mode": Mistake("BN102", momentum(0.3, backbone_in_eval), False),
    "model.eval() over a frozen backbone and a new head": Mistake("BN102", all_in_eval_with_a_frozen_backbone, False),
    "eval mode forgotten in the step": Mistake("BN103", momentum(0.3, Forgets), True),
    "train mode in validation": Mistake("BN104", WritesInValidation, True, {"held_out": by_class(HELD_OUT)}),
    "a hook that restores nothing": Mistake("BN105", momentum(0.3, RestoresNothing), True),
    "a forward under no_grad": Mistake("BN106", ForwardsWithoutGrad, True),
    "a forward between batches": Mistake("BN107", ForwardsBetween, True),
    "a frozen backbone beside a new head": Mistake("BN201", frozen_backbone, False),
    "frozen blocks in the container of the head": Mistake(
        "BN201", lambda fixed: pretrained(Program(fixed, Interleaved())), False
    ),
    "a backbone that no optimizer holds": Mistake("BN201", lambda fixed: pretrained(LeftOut(fixed)), False),
    "activation checkpointing": Mistake("BN202", momentum(0.5, lambda fixed: Program(fixed, Checkpointed())), False),
    "a batch that counts twice": Mistake("BN202", momentum(0.5, CountsTwice), False),
    "an infinity in the data": Mistake("BN203", SkipsNonfinite, True, {"data": with_infinity()}),
    "a batch norm that evaluation alone runs": Mistake("BN204", OwnNormInEvaluation, True, {"at_the_end": True}),
    "BaseFinetuning.freeze(train_bn=False)": Mistake(
        "BN205", lambda fixed: pretrained(OtherImages(fixed)), True, {"callbacks": [Freezes]}
    ),
    "bfloat16 with a small momentum": Mistake("BN206", momentum(0.01), True, {"precision": "bf16-true"}),
    "averaged weights": Mistake("BN207", Raw, False, {"callbacks": [lambda: EMAWeightAveraging(decay=0.999)]}),
    "weights exchanged in the step": Mistake("BN207", SwapsInStep, True),
    "weights exchanged in on_validation_model_eval": Mistake("BN207", SwapsBefore, True),
    "weights exchanged in on_train_end": Mistake("BN207", SwapsAtTheEnd, True, {"at_the_end": True}),
    "a slow average": Mistake("BN208", momentum(0.001), True),
    "a teacher in eval mode": Mistake("BN209", lambda fixed: MeanTeacher(fixed, in_training=True), True),
    "a copy that validation alone reads": Mistake("BN209", lambda fixed: MeanTeacher(fixed, in_training=False), True),
    "a channel that lives in evaluation alone": Mistake("BN210", SensorOffInTraining, True, {"at_the_end": True}),
    "copies that validation alone reads": Mistake("BN209", TwoTeachers, True, {"at_the_end": True}),
    "no running statistics": Mistake("BN211", without_statistics, True, {"held_out": by_class(HELD_OUT)}),
    "momentum 1 and small batches": Mistake("BN301", momentum(1.0), False, SMALL),
    "Keras' momentum": Mistake("BN301", momentum(0.9), False, SMALL),
    "momentum 0": Mistake("BN301", momentum(0.0), True),
    "batches of one": Mistake("BN302", Contrasts, True, {"loader": {"batch_size": 1}, "max_epochs": 1}),
    "every batch of one": Mistake("BN302", Program, True, {"loader": {"batch_size": 1}, "raises": True}),
    "a last batch of one": Mistake("BN302", Program, True, {"data": dataset(97), "raises": True}),
    "a bias": Mistake("BN303", with_bias, False),
    "accumulated batches": Mistake("BN304", Program, False, {"accumulate_grad_batches": 3}),
    "dropout before a batch norm": Mistake("BN305", dropout_first, True, {"at_the_end": True}),
    "sorted data": Mistake(
        "BN307", Program, True, {"data": by_class(dataset(192)), "loader": {"batch_size": 8}, "max_epochs": 2}
    ),
}
