"""Averages of weights, and averages of statistics that are too slow or too fast."""

from __future__ import annotations

import copy
from typing import Any

import torch
from digits import Classifier, ConvNet
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from costs.base import Outcome, Setting, mistake, train, with_momentum
from lightning_bn import BatchNormRecalibration


@mistake("BN207", "averaged weights of decay 0.995, buffers not averaged", use_buffers=False)
@mistake("BN207", "averaged weights and buffers of decay 0.995", use_buffers=True)
def averaged(setting: Setting, mend: bool, use_buffers: bool) -> Outcome:
    recalibration = [BatchNormRecalibration(when="validation")] * mend
    average = EMAWeightAveraging(decay=0.995, use_buffers=use_buffers)
    return train(Classifier(ConvNet()), setting, average, *recalibration)


@mistake("BN208", "momentum 0.001")
def slow(setting: Setting, mend: bool) -> Outcome:
    recalibration = [BatchNormRecalibration(when="validation")] * mend
    return train(Classifier(with_momentum(ConvNet(), 0.001)), setting, *recalibration)


class ValidatesCopy(Classifier):
    """Validates a copy whose weights are averaged, with or without the buffers."""

    def __init__(self, model: nn.Module, *, buffers: bool) -> None:
        super().__init__(model)
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.buffers_too = buffers

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) if self.training else self.ema(images)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        with torch.no_grad():
            for own, other in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                own.lerp_(other, 0.1)
            if self.buffers_too:
                for own, other in zip(self.ema.buffers(), self.model.buffers(), strict=True):
                    own.copy_(other)


@mistake("BN209", "a copy with averaged weights and the buffers it began with")
def copy_without_buffers(setting: Setting, mend: bool) -> Outcome:
    return train(ValidatesCopy(ConvNet(), buffers=mend), setting)


@mistake("BN301", "momentum 0", momentum=0.0)
@mistake("BN301", "momentum 1, batches of 8", momentum=1.0, batch_size=8)
@mistake("BN301", "momentum 0.9, as Keras has it", momentum=0.9)
def unusual_momentum(setting: Setting, mend: bool, momentum: float, batch_size: int = 32) -> Outcome:
    model = with_momentum(ConvNet(), 0.1 if mend else momentum)
    return train(Classifier(model), setting, batch_size=batch_size)
