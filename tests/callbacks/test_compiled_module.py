"""``trainer.fit(torch.compile(module))`` with the three callbacks."""

from __future__ import annotations

from typing import Any

import fitting
import lightning.pytorch as pl
import pytest
import torch
from small_data import loader, training_data
from small_models import Small
from states import matches_weights, parameters_equal
from torch import nn
from torch.utils.data import DataLoader

from lightning_bn import ActivationStatsMonitor, BatchNormRecalibration, ModeCheck, Window, convert_batch_norm
from lightning_bn.layers.deferred import DeferredUpdates

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own, on its way through Lightning's code


class Module(Small):
    """Without dropout, whose random numbers a compiled graph draws in another order."""

    # torch 2.13's compiler fails on the code by which Lightning 2.6 finds out from where it was called, with or without
    # this package.
    log = torch.compiler.disable(pl.LightningModule.log)

    def __init__(self) -> None:
        super().__init__()
        self.rest[1].p = 0.0
        convert_batch_norm(self, Window(3))


class Forgetful(Module):
    """Freezes a layer in the middle of the fit, where nobody asked for it."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            self.bn1.eval()


def fit(module: pl.LightningModule, *callbacks: pl.Callback, compiled: bool = True) -> pl.LightningModule:
    torch.compiler.reset()  # torch 2.6 can't compile a second module of the same class with a batch of another size
    torch.manual_seed(1)
    # aot_eager: all of the compiler but the generation of code, which takes a minute.
    model: Any = torch.compile(module, backend="aot_eager") if compiled else module
    validation = DataLoader(training_data(), 16)
    fitting.trainer(*callbacks, max_epochs=2).fit(model, loader(), validation)
    return module


def build(kind: type[Module] = Module) -> Module:
    torch.manual_seed(0)
    return kind()


@pytest.fixture(scope="module")
def plain() -> pl.LightningModule:
    """A compiled module, fitted without a callback."""
    return fit(build())


def test_all_three_callbacks(plain: pl.LightningModule) -> None:
    """They see every layer, find no mistake, recalibrate to the data under the final weights, and change no weight."""
    monitor, check, recalibration = (
        ActivationStatsMonitor(every_n_steps=2),
        ModeCheck(action="raise"),
        BatchNormRecalibration(),
    )
    watched = fit(build(), monitor, check, recalibration)
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert {row["layer"] for row in monitor.table()} >= {"bn1", "rest.0", "rest.3", "rest.4"}
    assert [finding for finding in check.findings if finding.level != "info"] == []
    assert recalibration.report.batches == 6
    assert recalibration.report.not_run == ()
    assert matches_weights(watched.state_dict())
    hooks = [
        hook
        for module in watched.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert all(isinstance(getattr(hook, "__self__", None), DeferredUpdates) for hook in hooks), (
        "but for what settle_together has placed"
    )


def test_recalibrated_before_validation_it_trains_on(plain: pl.LightningModule) -> None:
    """In the middle of the fit too, without a change to what is trained, to the bit."""
    assert parameters_equal(plain, fit(build(), BatchNormRecalibration(when="validation")))


def test_compiled_is_eager(plain: pl.LightningModule) -> None:
    """A windowed model has the weights, statistics and history of an uncompiled fit."""
    eager = fit(build(), compiled=False)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_a_mistake_is_found() -> None:
    """A layer that was put in eval mode under way is named, as it is without torch.compile."""
    found = []
    for compiled in (False, True):
        check = ModeCheck(action="log")
        fit(build(Forgetful), check, compiled=compiled)
        found.append({(finding.code, finding.layers) for finding in check.findings if finding.code == "BN102"})
    assert all(any("bn1" in layers for _, layers in each) for each in found)


def test_the_module_is_found_through_the_compiled_one() -> None:
    """Conversion and names reach the layers of a module that was compiled before."""
    model = torch.compile(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), backend="aot_eager")
    convert_batch_norm(model, Window(3))
    model(torch.randn(8, 4))
    assert model.state_dict()["_orig_mod.1.averaging.cursor"].tolist() == [1] * 5
