"""Statistics that do not fit the weights or the batches: the real mistake in a real run, wherever it is made, and the
nearest legitimate thing, of which nothing is said."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitting import fit, quiet, trainer
from found import findings, of, only, serious
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from small_data import data
from small_models import Module
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import BatchNormRecalibration, Finding, ModeCheck
from lightning_bn.rules.evaluations import level_of

LAYERS = ("model.backbone.0.1", "model.backbone.1.1", "model.head.2")
PLACES = ("model_eval", "start", "epoch_start", "batch", "step")
STAGES: dict[str, Callable[[pl.Trainer, pl.LightningModule], Any]] = {
    "validation": lambda runner, module: runner.validate(module, data(batches=4), verbose=False),
    "test": lambda runner, module: runner.test(module, data(batches=4), verbose=False),
    "predict": lambda runner, module: runner.predict(module, data(batches=4)),
}


class Swaps(Module):
    """Images with a mean of five deviations; for evaluations the weights are multiplied, by .data as libraries do."""

    place, factor = "", 3.0

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images + 5)

    def swap(self, place: str, factor: float) -> None:
        if place == self.place:
            for parameter in self.parameters():
                parameter.data.mul_(factor)

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.swap("model_eval", self.factor)

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        self.swap("model_eval", 1 / self.factor)

    def on_validation_start(self) -> None:
        self.swap("start", self.factor)

    def on_validation_epoch_start(self) -> None:
        self.swap("epoch_start", self.factor)

    def on_validation_batch_start(self, *_: Any) -> None:
        self.swap("batch", self.factor)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.swap("step", self.factor)
        super().validation_step(batch, batch_idx)
        self.swap("step", 1 / self.factor)

    def on_validation_batch_end(self, *_: Any) -> None:
        self.swap("batch", 1 / self.factor)

    def on_validation_epoch_end(self) -> None:
        self.swap("epoch_start", 1 / self.factor)

    def on_validation_end(self) -> None:
        self.swap("start", 1 / self.factor)

    def on_train_end(self) -> None:
        self.swap("train_end", self.factor)


def swapped(place: str, factor: float = 3.0, batches: int = 40, **options: Any) -> list[Finding]:
    torch.manual_seed(0)
    module = Swaps()
    module.place, module.factor = place, factor
    return findings(module, loader=data(batches=batches), **options)


class TestBN207:
    @pytest.mark.parametrize("place", PLACES)
    def test_weights_exchanged_for_a_validation(self, place: str) -> None:
        """Wherever it is done, the first layer that is off is named, with the measurement and a fix for the place."""
        found = only("BN207", swapped(place))
        assert found.layers[0] == LAYERS[0]
        assert "normalises even the training images" in found.seen
        assert "of answers change" in found.seen
        assert found.fix.place == ("around that forward" if place in ("step", "batch") else "in the Trainer")

    def test_weights_exchanged_at_the_end(self) -> None:
        """Without any validation they are judged by the last training batch."""
        found = only("BN207", swapped("train_end", limit_val_batches=0))
        assert (found.layers[0], found.fix.code) == (LAYERS[0], "recalibrate(self, batches)")

    @pytest.mark.parametrize("place", PLACES)
    def test_an_exchange_that_loses_nothing(self, place: str) -> None:
        """Weights a little different fit the same statistics."""
        assert of("BN207", swapped(place, factor=1.02)) == []

    def test_too_few_batches(self) -> None:
        """After 29 training batches nothing is judged."""
        assert of("BN207", swapped("start", batches=29)) == []
        assert of("BN207", swapped("start", batches=30)) != []

    def test_recalibrated(self) -> None:
        """With this package's recalibration the statistics are those of the averaged weights."""
        recalibration = BatchNormRecalibration(when="validation")
        callbacks = WeightAveraging(use_buffers=False), recalibration
        assert serious(findings(Module(), *callbacks, loader=data(batches=40))) == []

    @pytest.mark.parametrize("use_buffers", [False, True])
    @pytest.mark.parametrize("repaired", [False, True])
    def test_an_average_that_never_began(self, use_buffers: bool, repaired: bool) -> None:
        """What is put in has not moved since the first weights: that is said, once, with the number of batches that
        have updated nothing, and no statistics are blamed."""
        average = EMAWeightAveraging(decay=0.9, update_starting_at_step=1000, use_buffers=use_buffers)
        repair = [BatchNormRecalibration(when="validation")] if repaired else []
        found = findings(Module(), average, *repair, max_epochs=2, loader=data(batches=40))
        assert serious(found) == ["BN207"]
        finding = only("BN207", found)
        assert "the average never began, and none of 40 training batches" in finding.seen
        assert "statistics" not in finding.title + finding.seen + finding.why

    def test_the_replay_leaves_nothing_behind(self) -> None:
        """Weights, buffers and generators are those of the run without the check, where the training batch is run again
        through a model that draws random numbers and counts its forwards."""

        class Counts(Swaps):
            place = "start"

            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("forwards", torch.zeros(()))

            def forward(self, images: Tensor) -> Tensor:
                self.forwards += 1
                return super().forward(images + 0.01 * torch.randn_like(images))

        states = []
        for check in ([], [ModeCheck(action="log")]):
            torch.manual_seed(0)
            module = Counts()
            with quiet():
                fit(*check, module=module, train=data(batches=40), val=data(batches=2), max_epochs=2)
            states.append((copy.deepcopy(module.state_dict()), torch.get_rng_state()))
            assert not check or of("BN207", check[0].findings)
        (one, generator), (other, other_generator) = states
        assert all(torch.equal(value, other[name]) for name, value in one.items())
        assert torch.equal(generator, other_generator)


class Jump(Module):
    """In the last epoch the weights before the first batch norm jump, and its statistics lag behind."""

    def __init__(self, factor: float, momentum: float = 0.02) -> None:
        super().__init__()
        self.factor = factor
        for layer in (self.model.backbone[0][1], self.model.backbone[1][1], self.model.head[2]):
            layer.momentum = momentum

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 50 and self.current_epoch == 2:
            with torch.no_grad():
                self.model.backbone[0][0].weight.mul_(self.factor)


class TestBN208:
    def jump(self, *arguments: float) -> list[Finding]:
        return of("BN208", findings(Jump(*arguments), loader=data(batches=64), max_epochs=3))

    def test_statistics_that_lag(self) -> None:
        """The layer is named, with the two ways out."""
        (finding,) = [each for each in self.jump(20.0) if each.step == 192]
        assert (finding.stage, finding.layers[0]) == ("validate", "model.backbone.0.1")
        assert "Window" in finding.message
        assert "BatchNormRecalibration" in finding.message

    @pytest.mark.parametrize("arguments", [(1.0,), (1.2,), (20.0, 0.3)])
    def test_statistics_that_follow(self, arguments: tuple[float, ...]) -> None:
        """Without the jump, after a small one, and with a momentum that has forgotten the old weights, all is fine."""
        assert [each for each in self.jump(*arguments) if each.step == 192] == []

    def test_data_of_another_kind(self) -> None:
        """Where only the evaluation's images are off, it is their kind: information."""
        train, other = data(batches=40), data(batches=4)
        shifted = DataLoader(TensorDataset(other.dataset.tensors[0] * 6, other.dataset.tensors[1]), 16)
        check, module = ModeCheck(action="log"), Swaps()
        module.lr = 1e-4  # or the statistics would lag behind the weights
        with quiet():
            fit(check, module=module, train=train, val=shifted, max_epochs=1)
        assert serious(check.findings) == []
        assert "its data differ" in only("BN208", check.findings).seen

    def test_a_step_that_asks_for_labels_first(self) -> None:
        """The replay takes what the loss was computed of, and not what the step ran without grad before."""

        class Asks(Swaps):
            lr = 1e-4

            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                self.eval()
                with torch.no_grad():
                    self(batch[0] * 6)
                self.train()
                return super().training_step(batch, batch_idx)

            def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
                super().validation_step([batch[0] * 6, batch[1]], batch_idx)

        (found,) = of("BN208", findings(Asks(), loader=data(batches=40)))
        assert (found.level, "its data differ" in found.seen) == ("info", True)

    @pytest.mark.parametrize("stage", STAGES)
    def test_weights_exchanged_for_an_evaluation_behind_a_fit(self, stage: str) -> None:
        """A validation, test or prediction behind a fit is judged by the fit's last training batch too."""

        class For(Swaps):
            pass

        setattr(For, f"on_{stage}_start", lambda self: self.swap(stage, self.factor))
        check, module = ModeCheck(action="log"), For()
        with quiet():
            _, runner = fit(check, module=module, train=data(batches=40), val=data(batches=2), max_epochs=1)
            assert serious(check.findings) == []
            module.place = stage
            STAGES[stage](runner, module)
        found = only("BN208", check.findings)
        assert (found.stage, found.layers[0]) == (stage.replace("validation", "validate"), LAYERS[0])
        assert "of answers change" in found.seen

    @pytest.mark.parametrize("stage", STAGES)
    def test_an_evaluation_alone(self, stage: str) -> None:
        """Where no training batch was seen it is information, by the evaluation's own images, and that is said."""
        torch.manual_seed(0)
        check, module = ModeCheck(action="log"), Swaps()
        with quiet():
            fit(module=module, train=data(batches=40), max_epochs=1, limit_val_batches=0)
            for parameter in module.parameters():
                parameter.data.mul_(3)
            STAGES[stage](trainer(check), module)
        found = only("BN208", check.findings)
        assert (found.level, found.layers[0]) == ("info", LAYERS[0])
        assert "no training batch was seen" in found.seen

    def test_a_model_of_several_inputs(self) -> None:
        """The replay gives the model all that the training batch gave it, by place and by name."""

        class Several(Swaps):
            place = "start"

            def forward(self, images: Tensor, mask: Tensor, *, shift: Tensor) -> Tensor:
                return self.model(images * mask + shift)

            def loss(self, batch: Any) -> Tensor:
                mask = torch.ones(len(batch[0]), 1, 1, 1)
                return nn.functional.cross_entropy(self(batch[0], mask, shift=5 * mask), batch[1])

        (found,) = of("BN207", findings(Several(), loader=data(batches=40)))
        assert "normalises even the training images" in found.seen
        assert "of answers change" in found.seen

    def test_layers_in_eval_mode_in_training(self) -> None:
        """Fine-tuning with the statistics of other data normalises alike in training and evaluation: nothing is
        said."""
        module = Module()  # `Swaps` calls train() behind a validation
        layers = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d)]
        for layer in layers:
            layer.eval()
            layer.running_mean += 10
        assert of("BN208", findings(module, loader=data(batches=40))) == []
        assert not any(layer.training for layer in layers)

    def test_a_layer_of_several_inputs(self) -> None:
        """Statistics of two kinds of images, as of a discriminator, fit neither alone, and nothing is said of them."""

        class OfTwoKinds(Module):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                return self.loss(batch) + self.loss([batch[0] + 3, batch[1]])

        module = OfTwoKinds()
        assert of("BN208", findings(module, loader=data(batches=40))) == []

    def test_the_largest_batch_of_the_epoch_is_run_again(self) -> None:
        """The last batch of an epoch may hold one image, which tells nothing of how many answers change."""

        sizes = []

        class Counts(Swaps):
            place = "start"

            def forward(self, images: Tensor) -> Tensor:
                sizes.append(len(images))
                return super().forward(images)

        dataset, module = data(batches=40).dataset, Counts()
        found = only("BN207", findings(module, loader=DataLoader(dataset, 16, sampler=range(40 * 16 - 14))))
        assert "of answers change" in found.seen
        assert sizes[-2:] == [16, 16]

    def test_several_calls_of_parts(self) -> None:
        """A module that calls its parts one after the other is run as a whole."""

        class Parts(Swaps):
            place = "start"

            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = self.model.backbone, self.model.head
                del self.model

            def forward(self, images: Tensor) -> Tensor:
                return self.second(self.first(images + 5))

        found = only("BN207", findings(Parts(), loader=data(batches=40)))
        assert found.layers[0] == "first.0.1"


def own_forwards(module: pl.LightningModule) -> None:
    module.train()
    for images, _ in data():
        module(images)
    module.eval()


def by_fvcore(module: pl.LightningModule) -> None:
    from fvcore.nn.precise_bn import update_bn_stats

    module.train()
    update_bn_stats(module, [images for images, _ in data()], 6)
    module.eval()


@pytest.mark.parametrize(
    "recalibrates", [own_forwards, partial(update_bn, data()), by_fvcore], ids=["forwards", "torch", "fvcore"]
)
def test_a_users_own_recalibration(recalibrates: Callable[[pl.LightningModule], None]) -> None:
    """By forwards of training batches in training mode, torch's `update_bn` or fvcore's `update_bn_stats` before a
    validation: the callback that does the same is advised at most, and nobody is accused of fitting to the evaluation's
    data; nor is a module whose own hook does it, which the Trainer calls later."""

    class InACallback(pl.Callback):
        @torch.no_grad()
        def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not trainer.sanity_checking:
                recalibrates(pl_module)

    class InTheModule(Module):
        def on_validation_start(self) -> None:
            InACallback().on_validation_start(self.trainer, self)

    if recalibrates is by_fvcore:
        pytest.importorskip("fvcore.nn.precise_bn")  # before warnings are silenced, which its import scripts
    found = [*findings(Module(), InACallback()), *findings(InTheModule())]
    assert serious(found) == []
    told = [each for each in found if each.code in ("BN104", "BN107")]
    assert {each.code for each in told} >= ({"BN104", "BN107"} if recalibrates is own_forwards else {"BN104"})
    assert all("BatchNormRecalibration" in each.fix.code for each in told)


@pytest.mark.parametrize(
    ("changed", "level"), [(None, "warning"), (0.1, "info"), (0.11, "warning"), (0.4, "warning"), (0.41, "error")]
)
def test_the_level_follows_the_harm(changed: float | None, level: str) -> None:
    """More than a tenth of the answers is a warning, more than two fifths an error."""
    assert level_of(changed) == level
