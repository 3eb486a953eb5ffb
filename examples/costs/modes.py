"""Modes, and forwards that should not count."""

from __future__ import annotations

from typing import Any, cast

import torch
from digits import Classifier, ConvNet, digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from costs.base import Batch, Outcome, Setting, mistake, pretrained, set_modes, train
from lightning_bn import paused_statistics


@mistake("BN100", "`torch.compile`, inside of which no hook fires")
def compiled(setting: Setting, mend: bool) -> Outcome:
    torch.compiler.reset()
    model: nn.Module = ConvNet()
    if not mend:
        model = cast("nn.Module", torch.compile(model, backend="aot_eager"))
    return train(Classifier(model), setting)


@mistake("BN101", "`module.eval()` before `fit`")
def in_eval(setting: Setting, mend: bool) -> Outcome:
    module = Classifier(ConvNet())
    module.train(mend)
    return train(module, setting)


@mistake("BN102", "a backbone, trained on inverted images, left in eval mode and fine-tuned")
def backbone_in_eval(setting: Setting, mend: bool) -> Outcome:
    module = Classifier(pretrained(setting))
    set_modes(module.model, mend)
    return train(module, setting)


class MetricInStep(Classifier):
    """Takes a metric of the training batch in eval mode."""

    def __init__(self, model: nn.Module, *, puts_back: bool) -> None:
        super().__init__(model)
        self.puts_back = puts_back

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.model.eval()
        with torch.no_grad():
            self.log("train_acc", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())
        if self.puts_back:
            self.model.train()
        return loss


@mistake("BN103", "`self.model.eval()` in `training_step`, not undone")
def metric_in_step(setting: Setting, mend: bool) -> Outcome:
    return train(MetricInStep(ConvNet(), puts_back=mend), setting)


class LossInValidation(Classifier):
    """Logs the training step's loss in validation too, of the same images or of inverted ones."""

    def __init__(self, model: nn.Module, *, in_train_mode: bool, inverted: bool) -> None:
        super().__init__(model)
        self.in_train_mode, self.inverted = in_train_mode, inverted

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        self.train(self.in_train_mode)
        with torch.no_grad():
            self.training_step((1 - images if self.inverted else images, labels), batch_idx)
        self.eval()
        super().validation_step(batch, batch_idx)


@mistake("BN104", "a forward of inverted images in train mode, in the validation step", inverted=True)
@mistake("BN104", "a forward of the validation images in train mode", inverted=False)
def loss_in_validation(setting: Setting, mend: bool, inverted: bool) -> Outcome:
    validation = DataLoader(digits(seed=setting.seed)[1].dataset, 32)
    return train(LossInValidation(ConvNet(), in_train_mode=not mend, inverted=inverted), setting, validation=validation)


class RestoresNothing(Classifier):
    """Overrides the hook that restores the modes, and does not call the original."""

    def on_validation_model_train(self) -> None:
        pass


@mistake("BN105", "an override of `on_validation_model_train` that restores nothing")
def restores_nothing(setting: Setting, mend: bool) -> Outcome:
    return train((Classifier if mend else RestoresNothing)(ConvNet()), setting)


class Noise(Classifier):
    """Runs noise through the model in the training step, or after it."""

    def __init__(self, model: nn.Module, *, in_step: bool, paused: bool) -> None:
        super().__init__(model)
        self.in_step, self.paused = in_step, paused

    @torch.no_grad()
    def run_noise(self) -> None:
        noise = 4 * torch.randn(32, 1, 8, 8)
        if self.paused:
            with paused_statistics(self.model):
                self.model(noise)
        else:
            self.model(noise)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.in_step:
            self.run_noise()
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.in_step:
            self.run_noise()


@mistake("BN106", "noise run through the model in the step, under `no_grad`", in_step=True)
@mistake("BN107", "noise run through the model between batches", in_step=False)
def noise(setting: Setting, mend: bool, in_step: bool) -> Outcome:
    return train(Noise(ConvNet(), in_step=in_step, paused=mend), setting)
