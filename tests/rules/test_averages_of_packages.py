"""Averaged weights of torch, torch_ema, timm and schedulefree in a fit: what is said without a repair, and with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from found import findings, of, serious
from others_packages import loaded_alone
from small_data import data
from small_models import Module
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_bn import BatchNormRecalibration, Finding, recalibrate

BATCHES = 40


class Far(Module):
    """Images with a mean of five deviations, which the first layer's statistics have to follow as its weights move."""

    lr, when_repaired = 0.2, False

    def __init__(self) -> None:
        super().__init__()
        self.off: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images + 5)

    @property
    def evaluated(self) -> nn.Module:
        return self.model

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluated(batch[0] + 5)
        self.off.append(off(self.evaluated))


def off(net: nn.Module) -> float:
    """How far the first layer's mean and variance are from those of all training images, in deviations and as a share
    of the variance: in float64."""
    convolution, norm, _ = net.backbone[0]
    images = data(batches=BATCHES).dataset.tensors[0].double() + 5
    with torch.no_grad():
        inputs = nn.functional.conv2d(images, convolution.weight.double()).transpose(0, 1).flatten(1)
    var, mean = torch.var_mean(inputs, 1)
    shift = ((norm.running_mean.double() - mean) / var.sqrt()).abs().max()
    return float(torch.maximum(shift, (norm.running_var.double() / var - 1).abs().max()))


def said(module: Far, *callbacks: Any) -> list[Finding]:
    return findings(module, *callbacks, loader=data(batches=BATCHES), num_sanity_val_steps=0, max_epochs=2)


class TorchEma(Far):
    """`ExponentialMovingAverage` of torch_ema, put in and taken out as its documentation does."""

    def __init__(self) -> None:
        super().__init__()
        torch_ema = pytest.importorskip("torch_ema")
        self.average = torch_ema.ExponentialMovingAverage(self.parameters(), decay=0.99, use_num_updates=False)

    def on_train_batch_end(self, *_: Any) -> None:
        self.average.update()

    def on_validation_start(self) -> None:
        self.average.store()
        self.average.copy_to()

    def on_validation_end(self) -> None:
        self.average.restore()


class ScheduleFree(Far):
    """The optimizer's averaged weights are in for a validation."""

    rate = 0.1

    def configure_optimizers(self) -> Any:
        return pytest.importorskip("schedulefree").AdamWScheduleFree(self.parameters(), lr=self.rate)

    def on_fit_start(self) -> None:
        self.optimizers().optimizer.train()

    def on_validation_start(self) -> None:
        self.optimizers().optimizer.eval()

    def on_validation_end(self) -> None:
        self.optimizers().optimizer.train()


class Copied(Far):
    """Evaluates a copy that is averaged, statistics and all, behind every batch."""

    def __init__(self, *, held: bool) -> None:
        super().__init__()
        copied = self.average()
        if held:
            self.copied = copied
        else:
            self.__dict__["copied"] = copied  # beside the module, as in a callback

    def average(self) -> nn.Module:
        return AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True).eval()

    @property
    def evaluated(self) -> nn.Module:
        return self.copied.module

    def on_train_batch_end(self, *_: Any) -> None:
        self.copied.update_parameters(self.model)

    def on_validation_start(self) -> None:
        if self.when_repaired:
            images = [images + 5 for images, _ in data(batches=BATCHES)]
            recalibrate(self.evaluated, images, layers="all", progress=False)


class Timms(Copied):
    """With `ModelEmaV3`."""

    def average(self) -> nn.Module:
        return loaded_alone("timm", "utils/model_ema.py").ModelEmaV3(self.model, decay=0.99)

    def on_train_batch_end(self, *_: Any) -> None:
        self.copied.update(self.model)


@pytest.mark.parametrize("make", [TorchEma, ScheduleFree])
def test_weights_that_a_package_puts_in(make: type[Far]) -> None:
    """Those that lag are told as averaged weights with others' statistics; recalibrated, their statistics are those of
    all training images, and nothing is said."""
    torch.manual_seed(0)
    module = make()
    found = said(module)
    assert max(module.off) > 0.1
    assert {each.layers[0] for each in of("BN207", found)} == {"model.backbone.0.1"}
    torch.manual_seed(0)
    module = make()
    found = said(module, BatchNormRecalibration(when="validation", num_batches=None))
    assert max(module.off) < 1e-5
    assert serious(found) == []


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("make", [Copied, Timms])
def test_copies_that_a_package_averages(make: type[Copied], held: bool) -> None:
    """The averaged statistics of a copy are told not to fit its averaged weights, wherever it is; recalibrated before
    the evaluation they are those of all training images, and nothing is said."""
    torch.manual_seed(0)
    module = make(held=held)
    found = said(module)
    assert max(module.off) > 0.1
    (finding,) = [each for each in found if each.level != "info"]
    assert finding.code == "BN208"
    assert finding.layers[0].endswith("backbone.0.1")
    torch.manual_seed(0)
    module = make(held=held)
    module.when_repaired = True
    found = said(module)
    assert max(module.off) < 1e-5
    assert serious(found) == []


def test_schedule_free_weights_that_lose_nothing() -> None:
    """At a rate at which weights hardly move, their average fits the statistics as they are: nothing is said."""
    torch.manual_seed(0)
    module = ScheduleFree()
    module.rate = 1e-4
    before = copy.deepcopy(module.state_dict())
    assert serious(said(module)) == []
    assert not torch.equal(before["model.backbone.0.0.weight"], module.model.backbone[0][0].weight)
