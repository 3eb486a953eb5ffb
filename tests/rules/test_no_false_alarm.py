"""Honest runs, of which nothing above information is said."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fitting import quiet, trainer
from found import findings, serious
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from small_data import data
from small_models import Module, Net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import (
    BatchNormRecalibration,
    CompareAverages,
    Cumulative,
    Exponential,
    Finding,
    ModeCheck,
    Window,
    convert_batch_norm,
    recalibrated,
)


def said(*arguments: Any, **options: Any) -> list[Finding]:
    """Return the findings above information."""
    return [finding for finding in findings(*arguments, **options) if finding.level != "info"]


@pytest.mark.parametrize("epochs", [1, 4])
def test_plain_fit(epochs: int) -> None:
    """A plain fit, from its sanity check to its last epoch."""
    assert said(Module(), max_epochs=epochs) == []


def test_fit_validate_test_predict() -> None:
    """A fit, and every evaluation after it by the same Trainer."""
    check, module = ModeCheck(action="log"), Module()
    with quiet():
        run = trainer(check)
        run.fit(module, data(), data(batches=2))
        for stage in (run.validate, run.test, run.predict):
            stage(module, data(batches=2), verbose=False) if stage != run.predict else stage(module, data(batches=2))
        run.fit_loop.max_epochs = 2
        run.fit(module, data(), data(batches=2))
    assert serious(check.findings) == []


@pytest.mark.parametrize(
    "options", [{"val_check_interval": 2}, {"limit_train_batches": 1}, {"fast_dev_run": True}, {"overfit_batches": 2}]
)
def test_unusual_loops(options: dict[str, Any]) -> None:
    """Validations within an epoch, epochs of one batch, a dry run."""
    assert said(Module(), **options) == []


@pytest.mark.parametrize("averaging", [Window(3), Window(3, pooled=True), Exponential(0.1, debias=True), Cumulative()])
def test_own_layers(averaging: Any) -> None:
    """This package's layers, with every average."""
    assert said(Module(convert_batch_norm(Net(), averaging)), max_epochs=2) == []


class Subclass(nn.BatchNorm2d):
    """A third-party batch norm, with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize("averaging", [None, Window(3)])
def test_subclasses(averaging: Any) -> None:
    """Third-party layers, as they are and with an average of this package around them."""
    model = Net()
    model.backbone[0][1] = Subclass(4)
    assert said(Module(convert_batch_norm(model, averaging)), max_epochs=2) == []


class ResNetLike(Module):
    """A `backbone` as Lightning's finetuning wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.model.backbone, self.model.head

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=0.01)


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


@pytest.mark.parametrize("finetuning", [Unfreeze, lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1)])
def test_finetuning(finetuning: Any) -> None:
    """Lightning's finetuning callbacks with train_bn=True, frozen and unfrozen."""
    assert said(ResNetLike(), finetuning(), max_epochs=3) == []


@pytest.mark.parametrize("frozen", [False, True])
def test_backbone_in_eval(frozen: bool) -> None:
    """A backbone in eval mode that `allow_eval` lists."""
    module = Module()
    module.model.backbone.eval().requires_grad_(not frozen)
    assert said(module, check=ModeCheck(action="log", allow_eval=["model.backbone"]), max_epochs=2) == []


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 36))

    def forward(self, noise: Tensor) -> Tensor:
        return self.net(noise).reshape(-1, 1, 6, 6)


class GAN(Module):
    """Lightning's own example: two optimizers by hand, the generator run again for the discriminator's step."""

    def __init__(self, *, discriminator_first: bool) -> None:
        super().__init__(Net())
        self.generator = Generator()
        self.automatic_optimization = False
        self.discriminator_first = discriminator_first

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, _ = batch
        noise = torch.randn(len(images), 4)
        real, fake = torch.ones(len(images)).long(), torch.zeros(len(images)).long()
        steps = [self.step_generator, self.step_discriminator]
        for step in reversed(steps) if self.discriminator_first else steps:
            step(images, noise, real, fake)

    def step_generator(self, images: Tensor, noise: Tensor, real: Tensor, fake: Tensor) -> None:
        optimizer, _ = self.optimizers()
        self.toggle_optimizer(optimizer)
        self.manual_backward(F.cross_entropy(self.model(self(noise)), real))
        optimizer.step()
        optimizer.zero_grad()
        self.untoggle_optimizer(optimizer)

    def step_discriminator(self, images: Tensor, noise: Tensor, real: Tensor, fake: Tensor) -> None:
        _, optimizer = self.optimizers()
        self.toggle_optimizer(optimizer)
        loss = F.cross_entropy(self.model(images), real) + F.cross_entropy(self.model(self(noise).detach()), fake)
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        self.untoggle_optimizer(optimizer)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.model(self(torch.randn(8, 4)))

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.generator, self.model)], []


@pytest.mark.parametrize("discriminator_first", [False, True])
def test_gan(discriminator_first: bool) -> None:
    """A GAN with manual optimisation, in either order of its steps."""
    assert said(GAN(discriminator_first=discriminator_first), max_epochs=2) == []


@pytest.mark.parametrize("averaging", [
    lambda: EMAWeightAveraging(decay=0.9),
    lambda: EMAWeightAveraging(decay=0.9, update_every_n_steps=3),
    lambda: WeightAveraging(use_buffers=True),
    lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2),
])  # fmt: skip
def test_weight_averaging(averaging: Any) -> None:
    """Weights averaged with their buffers, or with statistics of their own at the end."""
    assert said(Module(), averaging(), max_epochs=4) == []


def test_gradient_accumulation() -> None:
    """Accumulated gradients are information."""
    assert said(Module(), accumulate_grad_batches=2, max_epochs=2) == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    """Activation checkpointing with this package's layers."""

    class Checkpointed(Net):
        def forward(self, images: Tensor) -> Tensor:
            images = images.requires_grad_(torch.is_grad_enabled())
            return self.head(checkpoint(self.backbone, images, use_reentrant=reentrant))

    assert said(Module(convert_batch_norm(Checkpointed())), max_epochs=2) == []


def test_without_batch_norm() -> None:
    """A model that has none."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Dropout(0.5), nn.LayerNorm(8), nn.Linear(8, 2))
    assert findings(Module(model)) == []


def test_modules_that_are_not_called_in_training() -> None:
    """A metric network in eval mode and a frozen one beside the model, as attributes."""
    module = Module()
    module.critic = copy.deepcopy(module.model).eval().requires_grad_(False)
    assert said(module) == []


class MonteCarlo(Module):
    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        for part in self.modules():
            if isinstance(part, nn.Dropout):
                part.train()
        return torch.stack([self(batch[0]) for _ in range(3)]).mean(0)


def test_monte_carlo_dropout() -> None:
    """Dropout alone in train mode for predict, after a fit, and a fit after that."""
    check, module = ModeCheck(action="log"), MonteCarlo()
    with quiet():
        run = trainer(check)
        run.fit(module, data(), data(batches=2))
        run.predict(module, data(batches=2))
        run.fit_loop.max_epochs = 2
        run.fit(module, data(), data(batches=2))
    assert serious(check.findings) == []


@pytest.mark.parametrize("when", ["fit_end", "validation"])
@pytest.mark.parametrize("exact", [False, True])
def test_recalibration(when: str, exact: bool) -> None:
    """This package's own recalibration, whose forwards have batch norm in train mode, in either order of the
    callbacks."""
    recalibration = BatchNormRecalibration(when=when, exact=exact)
    assert said(Module(), recalibration, max_epochs=2) == []
    check = ModeCheck(action="log")
    with quiet():
        trainer(check, BatchNormRecalibration(when=when, exact=exact), max_epochs=2).fit(
            Module(), data(), data(batches=2)
        )
    assert serious(check.findings) == []


def test_recalibration_behind_dropout() -> None:
    """Recalibrated before each validation, statistics have no dropout's variance, as those of the batches do."""
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.8), nn.BatchNorm1d(36), nn.Linear(36, 2))
    options = {"loader": data(batches=40), "max_epochs": 2}
    assert said(Module(model), BatchNormRecalibration(when="validation"), **options) == []


def test_recalibration_for_other_images() -> None:
    """Recalibrated before each validation for the images of that validation, statistics are far from the training
    batches', on purpose."""
    others = DataLoader(TensorDataset(torch.randn(64, 1, 6, 6) + 3, torch.zeros(64, dtype=torch.int64)), 16)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 2))
    check, recalibration = ModeCheck(action="log"), BatchNormRecalibration(when="validation", dataloader=others)
    with quiet():
        trainer(check, recalibration, max_epochs=2).fit(Module(model), data(batches=40), others)
    assert serious(check.findings) == []


def test_channels_without_variance() -> None:
    """Pixels that are always black: their running variance is on its way from 1 to 0, and divides 0 by it."""

    class Framed(Module):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(F.pad(images, (3, 3, 3, 3)))

    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(144), nn.Linear(144, 2))
    assert said(Framed(model), loader=data(batches=40), max_epochs=2) == []


def test_recalibration_beside_averaged_weights() -> None:
    """Averaged weights with stale buffers, which the recalibration replaces before each validation and at the end."""
    callbacks = (
        EMAWeightAveraging(use_buffers=False, decay=0.9),
        BatchNormRecalibration(when="validation"),
        BatchNormRecalibration(),
    )
    assert said(Module(), *callbacks, max_epochs=2) == []


def test_comparing_averages() -> None:
    """This package's comparison of averages, which validates again with each of them."""

    class Logs(Module):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

    assert said(Logs(), CompareAverages({"window": Window(3)}), max_epochs=2) == []


def test_statistics_borrowed_for_a_validation() -> None:
    """`recalibrated` around an evaluation, inside a hook of the validation."""

    class Borrows(Module):
        def on_validation_epoch_start(self) -> None:
            images = [batch[0] for batch in data(batches=2)]
            with recalibrated(self.model, images, progress=False):
                self.model(images[0])

    assert said(Borrows(), max_epochs=2) == []


def test_transformers_resnet(tmp_path: Path) -> None:
    """A ResNet of transformers, saved, loaded (which leaves it in eval mode) and fine-tuned with .train(), as its
    documentation does."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2
    )
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)

    class FineTuned(Module):
        def __init__(self) -> None:
            super().__init__(transformers.ResNetForImageClassification.from_pretrained(tmp_path))

        def on_fit_start(self) -> None:
            self.model.train()

        def loss(self, batch: list[Tensor]) -> Tensor:
            return self.model(pixel_values=batch[0], labels=batch[1]).loss

    loader = DataLoader([(torch.randn(1, 32, 32), index % 2) for index in range(32)], 8)
    check = ModeCheck(action="log")
    with quiet():
        trainer(check, max_epochs=2).fit(FineTuned(), loader, loader)
    assert serious(check.findings) == []


def test_compiled_module() -> None:
    """A compiled module; what can't be seen inside it is said as information."""
    module = Module()
    check = ModeCheck(action="log", every_n_steps=2)
    with quiet():
        trainer(check, max_epochs=2).fit(torch.compile(module, backend="aot_eager"), data(), data(batches=2))
    assert serious(check.findings) == []


def test_compiled_part() -> None:
    """A model that is compiled inside the module."""
    module = Module()
    module.model = torch.compile(module.model, backend="aot_eager")
    assert said(module, max_epochs=2) == []
