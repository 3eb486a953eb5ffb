"""Averaged copies that are held beside the module are judged as its own layers are; other networks are let alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fitting import fit, quiet
from found import findings, of
from small_data import data
from small_models import Module
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_bn import Finding, ModeCheck, recalibrate
from lightning_bn.rules.replay import Replay


class Averages(Module):
    """Evaluates an averaged copy that it holds in a list, of images with a mean of five deviations."""

    decay, use_buffers = 0.99, True

    def __init__(self) -> None:
        super().__init__()
        average = get_ema_multi_avg_fn(self.decay)
        self.held = [AveragedModel(self.model, multi_avg_fn=average, use_buffers=self.use_buffers).eval()]
        self.lr = 0.05

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images + 5)

    def on_train_batch_end(self, *_: Any) -> None:
        self.held[0].update_parameters(self.model)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.held[0](batch[0] + 5)


class Stale(Averages):
    """Its statistics are those of the first weights."""

    use_buffers = False


class Recalibrated(Stale):
    def on_validation_start(self) -> None:
        recalibrate(self.held[0], [images + 5 for images, _ in data(batches=40)], layers="all", progress=False)


class Frozen(Averages):
    """Trains with the statistics of other data, and so does its copy evaluate."""

    def on_train_epoch_start(self) -> None:
        for layer in self.model.modules():
            if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
                layer.eval()


class Other(Module):
    """Evaluates another network too, as a metric may, whose statistics do not fit the images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.held = [nn.Sequential(nn.Conv2d(1, 64, 3), nn.BatchNorm2d(64)).eval()]

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.held[0](batch[0] * 20)
        super().validation_step(batch, batch_idx)


class Wrapped(Module):
    """Evaluates itself through a wrapper, as a strategy does."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [nn.Sequential(self.model)]

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.held[0](batch[0] * 20)


def found(make: Callable[[], Module], **options: Any) -> list[Finding]:
    torch.manual_seed(0)
    return findings(make(), loader=data(batches=40), **options)


def test_a_copy_in_a_list() -> None:
    """Its first layer is named, with the measurement on the training images, its class, and the line that mends it."""
    (finding,) = of("BN208", found(Stale))
    assert finding.level != "info"
    assert finding.layers[0] == "AveragedModel:module.backbone.0.1"
    assert finding.seen.startswith("validate runs AveragedModel, which is like the model and no part of it")
    assert "normalises even the training images" in finding.seen
    assert "of answers change" in finding.seen
    assert finding.fix.code == 'recalibrate(copy, batches, layers="all")'


@pytest.mark.parametrize("make", [Recalibrated, Frozen, Other, Wrapped])
def test_what_fits_and_what_is_no_copy(make: Callable[[], Module]) -> None:
    """Nothing is said of a copy whose statistics were recalibrated, nor of one of a model with frozen ones, nor of a
    network that is unlike the model, nor of what wraps it."""
    assert [each.seen for each in found(make) if each.level != "info" or "part of it" in each.seen] == []


def test_several_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model and its copy are judged by the first one, once each."""

    class Both(Stale):
        def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
            self.model(batch[0])
            super().validation_step(batch, batch_idx)

    replay, runs = Replay.alone, []
    monkeypatch.setattr(Replay, "alone", lambda self, *given: runs.append(self) or replay(self, *given))
    torch.manual_seed(0)
    with quiet():
        fit(ModeCheck(action="log"), module=Both(), train=data(batches=40), val=[data()] * 2, max_epochs=1)
    assert len(runs) == 2


@pytest.mark.parametrize("stops_at", [1, 2])
def test_no_hook_is_left(stops_at: int) -> None:
    """The hook on all modules is gone behind the first batch, and after an evaluation that raises in it."""

    class Raises(Stale):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if not self.trainer.sanity_checking:
                there.append(len(torch_module._global_forward_pre_hooks) > before)
            if len(there) == stops_at:
                raise ZeroDivisionError

    before, there = len(torch_module._global_forward_pre_hooks), []
    with pytest.raises(ZeroDivisionError):
        found(Raises)
    assert there == [True, False][:stops_at]
    assert len(torch_module._global_forward_pre_hooks) == before
