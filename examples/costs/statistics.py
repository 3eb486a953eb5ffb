"""Running statistics of frozen layers, of layers that run twice, and of batches that are not finite."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from digits import Classifier, ConvNet, digits
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from costs.base import (
    Batch,
    Outcome,
    Setting,
    blocks,
    features,
    mistake,
    pretrained,
    set_modes,
    train,
    with_momentum,
)
from lightning_bn import Exponential, convert_batch_norm, recalibrate

OTHER = "a frozen backbone, trained on inverted images, in train mode"


class OnlyHead(Classifier):
    """Fine-tunes the head of a pretrained network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        for block in blocks(model):
            block.requires_grad_(False)


@mistake("BN201", "a frozen backbone, trained on the same images, in train mode, batches of 4", batch_size=4)
def frozen(setting: Setting, mend: bool, batch_size: int) -> Outcome:
    module = OnlyHead(pretrained(setting, Classifier))
    set_modes(module.model, not mend)
    return train(module, setting, batch_size=batch_size)


@mistake("BN201", f"{OTHER}; mended by `recalibrate` and `.eval()`", adapt=True)
@mistake("BN201", f"{OTHER}; mended by `.eval()`", adapt=False)
def frozen_on_other_images(setting: Setting, mend: bool, adapt: bool) -> Outcome:
    module = OnlyHead(pretrained(setting))
    if mend and adapt:
        recalibrate(module.model, digits(seed=setting.seed)[0], layers="all", progress=False)
    set_modes(module.model, not mend)
    return train(module, setting)


class SecondHead(OnlyHead):
    """Trains a second head, and validates the first one on the images that it was trained on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.second = nn.Linear(32, 10)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.second(features(self.model, batch[0])), batch[1])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step((1 - batch[0], batch[1]), batch_idx)


@mistake("BN201", f"{OTHER}; accuracy of the old head on these")
def second_head(setting: Setting, mend: bool) -> Outcome:
    module = SecondHead(pretrained(setting))
    set_modes(module.model, not mend)
    return train(module, setting)


class Checkpointed(ConvNet):
    """Computes its features again in backward."""

    def forward(self, input: Tensor) -> Tensor:
        return self[-1](checkpoint(functools.partial(features, self), input, use_reentrant=False))


@mistake("BN202", "activation checkpointing, which counts a batch twice")
def checkpointed(setting: Setting, mend: bool) -> Outcome:
    model = Checkpointed()
    return train(Classifier(convert_batch_norm(model) if mend else model), setting)


@mistake("BN202", "one batch norm at two places")
def shared(setting: Setting, mend: bool) -> Outcome:
    model = ConvNet()
    first, second, *_ = blocks(model)
    if not mend:
        second[1] = first[1]
    return train(Classifier(model), setting)


class Overflows(Classifier):
    """One batch of infinities."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx == 3:
            self(torch.full_like(batch[0], float("inf")))
        return super().training_step(batch, batch_idx)


@mistake("BN203", "one batch of infinities")
def overflows(setting: Setting, mend: bool) -> Outcome:
    model = ConvNet()
    return train(Overflows(convert_batch_norm(model) if mend else model), setting)


class Freeze(BaseFinetuning):
    """Lightning's way to freeze a backbone with its batch norms."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(blocks(pl_module.model), train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        pass


@mistake("BN205", "a backbone of inverted images, frozen by `freeze(train_bn=False)`")
def frozen_by_lightning(setting: Setting, mend: bool) -> Outcome:
    module = OnlyHead(pretrained(setting))
    set_modes(module.model, not mend)
    return train(module, setting, Freeze())


@mistake("BN206", 'momentum 0.01 in bfloat16, `precision="bf16-true"`', momentum=0.01)
@mistake("BN206", 'momentum 0.05 in bfloat16, `precision="bf16-true"`', momentum=0.05)
def half_precision(setting: Setting, mend: bool, momentum: float) -> Outcome:
    model = with_momentum(ConvNet(), momentum)
    if mend:
        convert_batch_norm(model, Exponential(momentum, debias=True))
    return train(Classifier(model), setting, precision="bf16-true")
