"""Modules with manual optimisation, whose training step can't be run without training: how a batch goes in must be
said."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fitting import fit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from small_models import Small
from states import matches_weights, parameters_equal, same
from torch import Tensor, nn

from lightning_bn import BatchNormRecalibration


class Manual(Small):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(Small.forward(self, batch[0]), batch[1]))
        optimizer.step()


def test_manual_optimisation_with_a_forward() -> None:
    """A module with manual optimization goes through forward, and its training is not run again."""
    plain, _ = fit(module=Manual(), val=None)
    module, _ = fit(BatchNormRecalibration(), module=Manual(), val=None)
    assert matches_weights(module.state_dict())
    torch.manual_seed(0)
    one = Manual()
    two = copy.deepcopy(one)
    fit(module=one, val=None)
    fit(BatchNormRecalibration(), module=two, val=None)
    assert parameters_equal(one, two)
    assert isinstance(plain, Manual)


def test_manual_optimisation_without_a_usable_forward() -> None:
    """The error comes before the first step, names the argument, and what was tried."""

    class Without(Manual):
        forward = pl.LightningModule.forward

    class Unusable(Manual):
        def forward(self, inputs: Any) -> Tensor:
            return super().forward(inputs["image"])

    with pytest.raises(MisconfigurationException, match="forward=lambda module, batch"):
        fit(BatchNormRecalibration(), module=Without(), val=None)
    module = Unusable()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MisconfigurationException, match=r"forward\(batch\[0\]\) raised .*forward=lambda module, batch"):
        fit(BatchNormRecalibration(), module=module, val=None)
    assert same(before.values(), module.state_dict().values())


class Adversaries(Manual):
    """A GAN: the generator makes images of noise, so no batch goes into ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.judge = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)


def test_the_error_of_a_gan_suggests_a_call_that_was_not_tried_and_that_works() -> None:
    """What each way raised, and a call of the parts that hold batch norms, with a
    batch for those that take one; filled in, it works."""
    with pytest.raises(MisconfigurationException) as raised:
        fit(BatchNormRecalibration(), module=Adversaries(), val=None)
    message = str(raised.value)
    assert "forward(batch[0]) raised RuntimeError" in message
    assert "training_step was not tried, since the module uses manual optimization" in message
    suggested = "forward=lambda module, batch: (module.rest(...), module.generator(...), module.judge(batch[0]))"
    assert suggested in message
    assert "In place of ... goes what training_step gives that part" in message
    callback = BatchNormRecalibration(forward=lambda module, batch: module.generator(batch[0][:, :3]))
    with pytest.warns(UserWarning, match="did not run"):
        fit(callback, module=Adversaries(), val=None)
    assert [layer.name for layer in callback.report.layers] == ["generator.1"]


def test_a_gan_without_a_forward_is_refused_with_the_names_of_its_parts() -> None:
    """At the start of the fit, before any batch: what goes into them is left open."""

    class Parts(Adversaries):
        forward = pl.LightningModule.forward

    with pytest.raises(MisconfigurationException) as raised:
        fit(BatchNormRecalibration(), module=Parts(), val=None)
    call = "forward=lambda module, batch: (module.rest(...), module.generator(...), module.judge(...))"
    assert call in str(raised.value)
