"""Each rule about the configuration: the real mistake in a real run, and the nearest legitimate thing, of which nothing
is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from found import findings, of, only, serious
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import SingleDeviceStrategy
from small_data import data
from small_models import Block, Module, Net
from third_party import BatchNormAct2d
from torch import Tensor, nn

from lightning_bn import ModeCheck, Window, check, convert_batch_norm, watch


def with_momentum(momentum: float) -> Module:
    """Return a module whose first batch norm has `momentum`."""
    module = Module()
    module.model.backbone[0][1].momentum = momentum
    return module


class TestBN301:
    def test_momentum_zero(self) -> None:
        """Momentum 0 never moves the statistics, and is said before the first batch."""
        finding = only("BN301", findings(with_momentum(0.0)))
        assert (finding.level, finding.layers) == ("warning", ("model.backbone.0.1",))

    def test_momentum_zero_in_eval(self) -> None:
        """On a layer in eval mode it changes nothing."""
        module = with_momentum(0.0)
        module.model.backbone.eval().requires_grad_(False)
        assert serious(findings(module)) == []

    @pytest.mark.parametrize(("batch_size", "said"), [(16, True), (31, True), (32, False)])
    def test_momentum_one(self, batch_size: int, said: bool) -> None:
        """Momentum 1 is said with a batch of fewer than 32 samples."""
        assert bool(of("BN301", findings(with_momentum(1.0), loader=data(batch_size)))) == said


class TestBN302:
    def test_one_value(self) -> None:
        """A last batch of one image behind a flattening makes torch raise: one finding, which says at which layer, and
        why."""
        loader = data(3, batches=1)
        loader = torch.utils.data.DataLoader(loader.dataset, 2)
        check_ = ModeCheck(action="log")
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            findings(Module(), loader=loader, check=check_)
        (finding,) = (f for f in of("BN302", check_.findings) if f.level != "info")
        assert finding.level == "error"
        assert "at model.head.2 one value per channel" in finding.seen
        assert "in batch 1" in finding.message
        assert "drop_last=True" in finding.message

    def test_batch_of_one_image(self) -> None:
        """A batch of one image normalises the image by itself: a warning."""
        model = nn.Sequential(Block(1, 4), nn.Flatten(), nn.Linear(64, 2))
        finding = only("BN302", findings(Module(model), loader=data(1)))
        assert finding.level == "warning"
        assert "instance norm" in finding.message
        assert "16 values" in finding.message

    @pytest.mark.parametrize(("batch_size", "levels"), [(15, {"info"}), (16, set())])
    def test_few_values(self, batch_size: int, levels: set[str]) -> None:
        """Fewer than 16 values per channel are information."""
        found = of("BN302", findings(Module(), loader=data(batch_size)))
        assert {finding.level for finding in found} == levels

    def test_batch_of_one_in_eval(self) -> None:
        """In eval mode a batch of one is as good as any."""
        model = nn.Sequential(Block(1, 4), nn.Flatten(), nn.Linear(64, 2))
        model[0].eval().requires_grad_(False)
        assert serious(findings(Module(model), loader=data(1))) == []


class Biased(nn.Module):
    """A convolution and a linear layer with biases, each before a batch norm; `skip` also feeds the convolution's
    output elsewhere."""

    def __init__(self, *, skip: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.linear, self.last = nn.Linear(64, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 2)
        self.skip = skip

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        normalised = self.norm(features).relu()
        if self.skip:
            normalised = normalised + features
        return self.head(self.last(self.linear(normalised.flatten(1))))


class TestBN303:
    def test_dead_biases(self) -> None:
        """Both biases are named, and their gradients are nothing but rounding."""
        module = Module(Biased())
        finding = only("BN303", findings(module))
        assert finding.level == "info"
        assert finding.layers == ("model.norm", "model.last")
        assert "model.conv.bias, model.linear.bias" in finding.message
        (images, labels), *_ = data()
        module.loss([images, labels]).backward()
        assert module.model.conv.bias.grad.abs().max() < 1e-6 < module.model.head.bias.grad.abs().max()

    def test_a_bias_that_is_read_elsewhere(self) -> None:
        """Where the convolution's output also goes past the batch norm, its bias lives."""
        assert only("BN303", findings(Module(Biased(skip=True)))).layers == ("model.last",)

    def test_bfloat16(self) -> None:
        """The casts of autocast don't hide a bias."""
        assert only("BN303", findings(Module(Biased()), precision="bf16-mixed")).layers == ("model.norm", "model.last")

    def test_no_bias(self) -> None:
        """Layers built without a bias have none to name, nor has one behind an activation."""
        assert of("BN303", findings(Module())) == []
        behind = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
        assert of("BN303", findings(Module(behind))) == []


class TestBN304:
    def test_accumulated_gradients(self) -> None:
        """The samples of a batch and of a gradient are told."""
        finding = only("BN304", findings(Module(), accumulate_grad_batches=3))
        assert finding.level == "info"
        assert "normalised with 16 samples; the gradient has 48" in finding.message

    def test_one_device_one_batch(self) -> None:
        """Where the two are the same, nothing is said."""
        assert of("BN304", findings(Module())) == []


class Dropped(nn.Sequential):
    """A dropout directly before a batch norm, or a layer further away."""

    def __init__(self, *, straight: bool) -> None:
        dropout = nn.Dropout(0.5)
        super().__init__(
            nn.Flatten(),
            nn.Linear(36, 64),
            dropout if straight else nn.ReLU(),
            nn.BatchNorm1d(64),
            dropout,
            nn.Linear(64, 2),
        )


class TestBN305:
    def test_variance_is_measured(self) -> None:
        """The ratio is that of the variances on either side, in the first batch: about 1 / (1 - p) for centred data."""
        finding = only("BN305", findings(Module(Dropped(straight=True)), loader=data(512, batches=1)))
        assert (finding.level, finding.layers) == ("info", ("model.3",))
        ratio = float(finding.message.split("variance was ")[1].split()[0])
        assert ratio == pytest.approx(2.0, abs=0.2)

    def test_behind(self) -> None:
        """Dropout behind the batch norm is where it belongs."""
        assert of("BN305", findings(Module(Dropped(straight=False)))) == []

    def test_no_dropout(self) -> None:
        """A dropout of p=0 is none."""
        module = Module(Dropped(straight=True))
        module.model[2].p = 0.0
        assert of("BN305", findings(module)) == []


def test_check_sees_momentum_without_a_run() -> None:
    """`check` says of a model at rest what needs no run."""
    assert [finding.code for finding in check(with_momentum(0.0))] == ["BN301"]
    assert check(Net()) == []


class OwnNorm(nn.Module):
    """A batch norm that is no subclass of torch's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return nn.functional.batch_norm(images, self.running_mean, self.running_var)
        return nn.functional.batch_norm(images, self.running_mean, self.running_var, training=True)


class FrozenNorm(OwnNorm):
    """Statistics that never move, as in detection."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))


class SplitNorm(nn.BatchNorm2d):
    """A set of statistics for each part of a batch."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.running_mean = torch.zeros(2 * channels)
        self.running_var = torch.ones(2 * channels)

    def forward(self, images: Tensor) -> Tensor:
        return images


def with_norms() -> nn.Module:
    """Return a network with a torch layer, two norms that are not served, and a constant one."""
    norms = nn.Sequential(OwnNorm(4), SplitNorm(4), FrozenNorm(4))
    return nn.Sequential(Block(1, 4), norms, nn.Flatten(), nn.Linear(64, 2))


class TestBN100:
    WANTED = (("1.0", "OwnNorm", "no subclass"), ("1.1", "SplitNorm", "shape (8,)"))

    def test_norms_that_are_not_served(self) -> None:
        """`check`, `watch` and `ModeCheck` name each once, with its class and the reason, and not the constant one."""
        model = with_norms()
        with watch(model, action="log") as watched:
            for _ in range(3):
                model(torch.randn(4, 1, 6, 6)).sum().backward()
        fitted = findings(Module(with_norms()), max_epochs=2)
        for found, above in ((check(model), ""), (watched, ""), (fitted, "model.")):
            said = of("BN100", found)
            assert [finding.layers for finding in said] == [(above + name,) for name, _, _ in self.WANTED]
            for finding, (_, kind, reason) in zip(said, self.WANTED, strict=True):
                assert finding.level == "info"
                assert kind in finding.seen
                assert reason in finding.seen
        assert serious(fitted) == []

    def test_norms_that_are(self) -> None:
        """Torch's layers, and instance norms with statistics, are none of them."""
        model = nn.Sequential(nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True))
        assert of("BN100", check(model)) == []


class Converts(SingleDeviceStrategy):
    """Replaces layers when the strategies of several GPUs do, for one CPU, on which these refuse to."""

    def setup(self, trainer: Any) -> None:
        self.model = TorchSyncBatchNorm().apply(self.model)
        super().setup(trainer)


class TestBN308:
    def test_what_a_strategy_replaces(self) -> None:
        """In a fit the layers that lost a class or an average are named before the first batch, and torch's own is
        not."""
        layers = BatchNormAct2d(4), nn.BatchNorm2d(4), convert_batch_norm(nn.BatchNorm2d(4), Window(3))
        module = Module(nn.Sequential(nn.Conv2d(1, 4, 3), *layers, nn.Flatten(), nn.Linear(64, 2)))
        averaged, subclass = of("BN308", findings(module, strategy=Converts("cpu")))
        assert (averaged.level, averaged.layers) == ("warning", ("model.3",))
        assert averaged.seen.startswith("SyncBatchNorm holds an averaging that nothing calls")
        assert (subclass.level, subclass.layers) == ("warning", ("model.1",))
        assert subclass.seen == "BatchNormAct2d has become SyncBatchNorm."

    def test_an_average_that_is_no_longer_called(self) -> None:
        """A SyncBatchNorm that still holds the average of the layer it replaced; so does what Lightning puts in its
        place after a fit."""
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(convert_batch_norm(Net(), Window(3)))
        for model in (synced, TorchSyncBatchNorm().revert(synced)):
            finding = only("BN308", check(model))
            assert (finding.level, len(finding.layers)) == ("warning", 3)

    def test_layers_that_lost_nothing(self) -> None:
        """Torch's layers, synchronised or not, and averages at work, in a layer of this package or of another's."""
        for model in (
            Net(),
            nn.SyncBatchNorm.convert_sync_batchnorm(Net()),
            convert_batch_norm(Net(), Window(3)),
            convert_batch_norm(nn.Sequential(BatchNormAct2d(3)), Window(3)),
        ):
            assert of("BN308", check(model)) == []
