"""Silence means health: runs that compute and lose accuracy all the same, of which something is said."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from digits import Classifier, ConvNet, digits
from fitting import quiet, trainer
from found import findings, of, serious
from lightning.pytorch.callbacks import EMAWeightAveraging
from small_data import data
from small_models import Module, Net
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_bn import BatchNorm1d, Finding, ModeCheck, Window, check, convert_batch_norm, recalibrate, watch


def only(code: str, found: list[Finding]) -> Finding:
    """Return the one finding of `code` above information."""
    (finding,) = (each for each in of(code, found) if each.level != "info")
    return finding


def accuracy(module: pl.LightningModule, loader: DataLoader[Any]) -> float:
    """Return the share of right answers in eval mode."""
    module.eval()
    with torch.no_grad():
        right = [(module(images).argmax(1) == labels).float().mean().item() for images, labels in loader]
    return sum(right) / len(right)


def test_slow_average_on_digits() -> None:
    """Momentum 0.001 and three epochs: validation is near chance, a recalibration would give nearly all, and it is said
    in plain words."""
    torch.manual_seed(0)
    module = Classifier(ConvNet())
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.001
    train, validation = digits()
    check_ = ModeCheck(action="log")
    with quiet():
        trainer(check_, max_epochs=3).fit(module, train, validation)
    finding = of("BN208", check_.findings)[0]
    assert (finding.stage, finding.level) == ("validate", "error")
    assert "normalises even the training images" in finding.seen
    before = accuracy(module, validation)
    recalibrate(module, [images for images, _ in train], progress=False)
    assert before < 0.6 < 0.9 < accuracy(module, validation)


class Between(Module):
    """Runs the model in training mode where no batch is running."""

    def __init__(self, where: str, model: nn.Module | None = None) -> None:
        super().__init__(model)
        self.where = where

    def sample(self, where: str) -> None:
        if where == self.where:
            with torch.no_grad():
                self.model(torch.randn(16, 1, 6, 6))

    def on_train_batch_end(self, *args: Any) -> None:
        self.sample("on_train_batch_end")

    def on_train_epoch_end(self) -> None:
        self.sample("on_train_epoch_end")

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.model.train()
            self.sample("on_validation_end")
            self.model.eval()


class Rollouts(Dataset[Any]):
    """Data that a policy makes as they are asked for."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Any:
        with torch.no_grad():
            image = torch.randn(1, 6, 6)
            self.policy(torch.stack((image, image + 1)))
        return image, index % 2


class TestBetweenBatches:
    @pytest.mark.parametrize("where", ["on_train_batch_end", "on_train_epoch_end", "on_validation_end"])
    @pytest.mark.parametrize("own", [False, True])
    def test_hooks(self, where: str, own: bool) -> None:
        """A forward in the module's own hooks, with torch's layers and with this package's."""
        module = Between(where)
        if own:
            convert_batch_norm(module, Window(3))
        finding = only("BN107", findings(module, max_epochs=2))
        assert finding.layers == ("model.backbone.0.1", "model.backbone.1.1", "model.head.2")

    def test_rollouts_in_the_data(self) -> None:
        """A forward while the next batch is fetched."""
        module = Module()
        assert only("BN107", findings(module, loader=DataLoader(Rollouts(module.model), 16)))

    def test_in_eval_mode(self) -> None:
        """In eval mode such a forward moves nothing, and nothing is said; nor of a state that is loaded between
        batches."""

        class Samples(Module):
            def on_train_epoch_end(self) -> None:
                self.model.eval()
                self.model(torch.randn(4, 1, 6, 6))
                self.model.train()
                self.model.load_state_dict(copy.deepcopy(self.model.state_dict()))

        assert serious(findings(Samples(), max_epochs=2)) == []
        assert serious(findings(Samples(convert_batch_norm(Net(), Window(3))), max_epochs=2)) == []


class TestParametersAlone:
    """A checkpoint of parameters without buffers."""

    def loaded(self) -> Module:
        trained, fresh = Module(), Module()
        with quiet():
            trainer(max_epochs=1).fit(trained, data())
        fresh.load_state_dict(dict(trained.named_parameters()), strict=False)
        return fresh

    @pytest.mark.parametrize("stage", ["validate", "test", "predict"])
    def test_evaluated(self, stage: str) -> None:
        """Weights that were trained beside statistics that were not, evaluated without a fit: an error."""
        check_ = ModeCheck(action="log")
        with quiet():
            getattr(trainer(check_), stage)(self.loaded(), data(batches=2))
        assert "loaded without buffers" in only("BN204", check_.findings).seen

    def test_at_rest(self) -> None:
        """`check` sees it too, and says nothing of a fresh model, of one initialised as a GAN is, or of one that a fit
        will train on."""
        assert only("BN204", check(self.loaded())).level == "error"
        fresh = Net()
        for part in fresh.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(part.weight, 1.0, 0.02)
        assert check(fresh) == []
        assert serious(findings(self.loaded())) == []


def test_averaged_buffers_at_a_high_decay() -> None:
    """Averaged buffers lag behind averaged weights: said at the validation that reads them, with the mend that
    helps."""
    found = findings(Module(), EMAWeightAveraging(decay=0.999), loader=data(batches=40), max_epochs=1)
    finding = only("BN207", found)
    assert "normalises even the training images" in finding.seen
    assert finding.fix.code == 'callbacks=[..., BatchNormRecalibration(when="validation")]'


@pytest.mark.filterwarnings("ignore:BN301")
@pytest.mark.parametrize(
    ("momentum", "levels"), [(0.997, ["warning"]), (0.9, ["warning"]), (0.51, ["info"]), (0.5, []), (0.1, [])]
)
def test_keras_momentum(momentum: float, levels: list[str]) -> None:
    """A momentum above 0.5 looks like Keras', which weighs the old value: information that asks, and a warning where
    it makes sense in no other framework's convention, as a published mobile network's 0.997."""
    module = Module()
    module.model.backbone[0][1].momentum = momentum
    found = of("BN301", findings(module))
    assert [finding.level for finding in found] == levels
    assert not levels or f"did you mean {1 - momentum:g}?" in found[0].seen


def sorted_data(*, shuffle: bool, by_class: bool = True) -> DataLoader[Any]:
    """Eight classes of different brightness, in order of the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8).repeat_interleave(48)
    if not by_class:
        labels = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.randn(len(labels), 1, 6, 6, generator=generator) + labels.reshape(-1, 1, 1, 1) / 2
    return DataLoader(TensorDataset(images, labels % 2), 16, shuffle=shuffle)


class TestSorted:
    def test_sorted_and_unshuffled(self) -> None:
        """Batches of one class after the other, in each epoch."""
        assert (
            only("BN307", findings(Module(), loader=sorted_data(shuffle=False), max_epochs=2)).fix.code
            == "shuffle=True"
        )

    def test_shuffled_or_unsorted(self) -> None:
        """Shuffled data, and data that lie in no order, are as they should be; also where the weights move fast."""
        assert of("BN307", findings(Module(), loader=sorted_data(shuffle=True), max_epochs=2)) == []
        assert of("BN307", findings(Module(), loader=sorted_data(shuffle=False, by_class=False), max_epochs=2)) == []

        class Fast(Module):
            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)

        assert of("BN307", findings(Fast(), loader=sorted_data(shuffle=False, by_class=False), max_epochs=2)) == []


def test_channel_that_lives_in_validation() -> None:
    """A channel that is constant in training and varies in validation is divided by next to nothing."""

    class Constant(Module):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.BatchNorm2d(2, momentum=0.5), nn.Flatten(), nn.Linear(72, 2)))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self(torch.cat((batch[0], torch.zeros_like(batch[0])), 1)), batch[1])

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self(torch.cat((batch[0], batch[0] if self.varies else torch.zeros_like(batch[0])), 1))

        varies = True

    finding = only("BN210", findings(Constant(), loader=data(batches=40)))
    assert "channel 1 " in finding.seen
    Constant.varies = False
    assert of("BN210", findings(Constant(), loader=data(batches=40))) == []


def test_no_running_statistics() -> None:
    """A layer without running statistics makes an evaluation depend on the batch: information."""
    model = Net()
    model.backbone[0][1] = nn.BatchNorm2d(4, track_running_stats=False)
    (finding,) = of("BN211", findings(Module(model)))
    assert (finding.level, finding.layers) == ("info", ("model.backbone.0.1",))


class TestCascades:
    def test_follows(self) -> None:
        """Validation at 0 and 1 follows from eval mode in training; a gap follows from a mixture of inputs: one finding
        each."""
        module = Module()
        module.model.backbone.eval()
        found = findings(module)
        assert serious(found) == ["BN102"]
        assert [finding.follows for finding in of("BN204", found)] == ["BN102"]

    def test_ignored_rule_explains_nothing(self) -> None:
        """What follows from a rule that is not looked at is told by itself."""
        module = Module()
        module.model.backbone.eval()
        assert serious(findings(module, check=ModeCheck(action="log", ignore=["BN102"]))) == ["BN204"]


class TestNoFalseAlarm:
    """Section by section, the legitimate thing that is nearest."""

    def test_network_in_eval_that_training_never_runs(self) -> None:
        """An averaged copy as an attribute, whose parameters require grad as a copy's do."""

        class WithCopy(Module):
            def __init__(self) -> None:
                super().__init__()
                self.ema = copy.deepcopy(self.model).eval()

            def on_before_zero_grad(self, optimizer: Any) -> None:
                with torch.no_grad():
                    for own, other in zip(
                        self.ema.state_dict().values(), self.model.state_dict().values(), strict=True
                    ):
                        own.copy_(other)

            def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
                self.ema(batch[0])

        assert serious(findings(WithCopy(), max_epochs=2)) == []

    def test_perceptual_loss(self) -> None:
        """A pretrained network in eval mode that gradients flow through, which requires grad and is in no optimizer."""

        class Perceptual(Module):
            def __init__(self) -> None:
                super().__init__()
                self.features = Net().backbone.eval()
                self.out = nn.Conv2d(1, 1, 3, padding=1)

            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                return F.mse_loss(self.features(self.out(batch[0])), self.features(batch[0]))

            def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
                self.training_step(batch, batch_idx)

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.out.parameters(), lr=0.01)

        assert serious(findings(Perceptual())) == []

    def test_detection(self) -> None:
        """Batch norms alone in eval mode with an affine part that learns, as detection does: information."""

        class Detector(Module):
            def on_train_start(self) -> None:
                recalibrate(self.model, [images for images, _ in data()], progress=False)
                for part in self.model.modules():
                    if isinstance(part, nn.modules.batchnorm._BatchNorm):
                        part.eval()

        found = findings(Detector())
        assert serious(found) == []
        assert [finding.level for finding in of("BN102", found)] == ["info"]

    def test_lbfgs(self) -> None:
        """LBFGS runs a batch several times at weights of its own, and is not SAM."""

        class SecondOrder(Module):
            def configure_optimizers(self) -> Any:
                return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

        found = findings(SecondOrder())
        assert serious(found) == []
        assert "SAM" not in of("BN106", found)[0].seen
        assert "LBFGS" in of("BN106", found)[0].seen

    def test_used_from_the_second_epoch_on(self) -> None:
        """A head that training runs from the second epoch on, and validation from the first."""

        class Later(Module):
            def __init__(self) -> None:
                super().__init__()
                self.aux = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 2))

            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                loss = self.loss(batch)
                if self.current_epoch > 0:
                    loss = loss + F.cross_entropy(self.aux(self.model.backbone(batch[0].flip(-1))), batch[1])
                return loss

            def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
                self.aux(self.model.backbone(batch[0]))

        assert serious(findings(Later(), max_epochs=2)) == []

    def test_watch_knows_the_teacher(self) -> None:
        """Without a Trainer too a copy whose weights are averaged is told from a frozen layer."""
        student = Net()
        both = nn.ModuleDict({"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)})
        sgd = torch.optim.SGD(student.parameters(), lr=0.1)
        with watch(both, action="log") as found:
            for images, labels in data():
                with torch.no_grad():
                    target = both["teacher"](images).softmax(1)
                answer = student(images)
                (F.cross_entropy(answer, labels) + F.mse_loss(answer.softmax(1), target)).backward()
                sgd.step()
                sgd.zero_grad()
                with torch.no_grad():
                    for own, other in zip(both["teacher"].parameters(), student.parameters(), strict=True):
                        own.lerp_(other, 0.1)
        assert serious(found) == []


def test_layers_of_this_package_between_batches() -> None:
    """A converted layer whose batch is skipped is no forward that counts."""
    layer = BatchNorm1d(2)
    model = nn.Sequential(layer)
    with watch(model, action="log") as found, torch.no_grad():
        model(torch.full((4, 2), float("nan")))
    assert of("BN107", found) == []
