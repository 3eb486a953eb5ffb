"""What a norm divides by, how large its weights are, and channels that are far larger than the others."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fitting import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import ActivationStatsMonitor, Window, convert_batch_norm
from lightning_bn.activations.collector import LayerCollector
from lightning_bn.activations.registry import STATISTICS
from lightning_bn.activations.watched_layers import select_layers


@pytest.mark.parametrize("window", [False, True], ids=["torch's", "window"])
def test_channels_that_are_divided_by_eps_are_counted(window: bool) -> None:
    """The share of channels whose batch variance is below eps, from the buffers or as the layer tells."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())
    if window:
        convert_batch_norm(model, Window(3))
    collector = LayerCollector(model, select_layers(model))
    for deviations, share in (((1.0, 1.0, 1e-4, 0.0), 0.5), ((1.0, 1.0, 1.0, 1.0), 0.0)):
        collector.attach()
        model(torch.randn(64, 4) * torch.tensor(deviations))
        collector.detach()
        assert collector.collect().rows["0"]["below_eps_fraction"] == share


class Deep(pl.LightningModule):
    """Three blocks with a gate behind them; of the first, the norm's weights are drawn as if it were a linear layer."""

    def __init__(self, spread: float | None, zero: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *[each for n in (4, 16, 16) for each in (nn.Linear(n, 16), nn.BatchNorm1d(16), nn.ReLU())],
            nn.Sigmoid(),
            nn.Linear(16, 2),
        )
        if spread is not None:
            for norm in (self.net[1], self.net[4], self.net[7]):
                nn.init.normal_(norm.weight, 0.0, spread)
        if zero:
            nn.init.zeros_(self.net[7].weight)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch), (batch[:, 0] > 0).long())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def watched(module: pl.LightningModule, data: Tensor, **options: object) -> ActivationStatsMonitor:
    monitor = ActivationStatsMonitor(every_n_steps=1, verbose=False)
    trainer(monitor, max_epochs=4, **options).fit(module, DataLoader(data, 32))
    return monitor


def test_affine_weights_that_are_drawn_around_0_are_the_cause() -> None:
    """The first norm is named, from the start, with the line that mends it."""
    torch.manual_seed(0)
    monitor = watched(Deep(0.02), torch.randn(256, 4))
    first, *_ = monitor.episodes()
    assert (first.layer, first.statistic, first.first) == ("net.1", "weight_rms", 0)
    assert "nn.init.ones_" in first.advice


@pytest.mark.parametrize("zero", [False, True], ids=["ones", "zero-initialised last norm"])
def test_usual_starts_are_silent(zero: bool) -> None:
    """Neither weights of 1, nor a last norm that begins with 0 and grows."""
    torch.manual_seed(0)
    monitor = watched(Deep(None, zero), torch.randn(256, 4))
    assert [each for each in monitor.episodes() if each.statistic.startswith("weight")] == []


class Encoder(pl.LightningModule):
    """A transformer, one channel of whose stream is multiplied by 100 at step 10."""

    def __init__(self, is_sick: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.embed, self.encoder = nn.Linear(8, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head, self.is_sick = nn.Linear(16, 2), is_sick

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.is_sick and self.global_step == 10:
            with torch.no_grad():
                self.encoder.layers[0].linear2.bias[3] = 100.0
        return self.head(self.encoder(self.embed(batch)).mean(1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_a_channel_that_outgrows_the_others_is_named_with_its_step() -> None:
    """By the residual sum in which it comes up; and a healthy transformer is silent."""
    for is_sick in (True, False):
        torch.manual_seed(0)
        monitor = watched(Encoder(is_sick), torch.randn(128, 8, 8))
        found = [(each.layer, each.first) for each in monitor.episodes() if each.statistic == "outlier_ratio"]
        assert found[:1] == ([("encoder.layers.0:add[2]", 10)] if is_sick else [])
        if not is_sick:
            assert monitor.episodes() == []


def test_the_ratio_is_that_of_a_plain_loop() -> None:
    """Largest over median (of an even number, the lower one), of the channels' root mean squares, in float64."""
    torch.manual_seed(0)
    model = nn.LayerNorm(12)
    nn.init.uniform_(model.weight, 0.1, 30.0)
    holder = nn.Sequential(nn.Linear(12, 12), model)
    collector = LayerCollector(holder, select_layers(holder))
    collector.attach()
    out = holder(torch.randn(6, 5, 12))
    collector.detach()
    rms = sorted(np.sqrt((out.detach().double().numpy().reshape(-1, 12) ** 2).mean(0)))
    assert collector.collect().rows["1"]["outlier_ratio"] == pytest.approx(rms[-1] / rms[5], rel=1e-5)


def test_dormant_channels_are_those_of_a_plain_loop() -> None:
    """Channels whose root mean square is at most 0.025 of the layer's mean one, also where none is exactly 0."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.SiLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 1e-3, 1e-4, 2.0, 1.0, 1e-6, 1.0])))
    collector = LayerCollector(model, select_layers(model))
    collector.attach()
    out = model(torch.randn(64, 8))
    collector.detach()
    rms = [float(np.sqrt((out[:, channel].detach().double().numpy() ** 2).mean())) for channel in range(8)]
    expected = sum(each <= 0.025 * sum(rms) / 8 for each in rms) / 8
    assert collector.collect().rows["1"]["dormant_fraction"] == expected == 3 / 8


def test_a_published_model_whose_norms_begin_near_0() -> None:
    """transformers' EfficientNet, built from its configuration, draws its batch norms' weights around 0: the first norm
    is named, from the start, and not the gates that its small activations leave half open; with the mend nothing is."""
    transformers = pytest.importorskip("transformers")
    config = transformers.EfficientNetConfig(
        num_channels=1, image_size=32, width_coefficient=0.25, depth_coefficient=0.2, hidden_dim=320, num_labels=2
    )

    class Published(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = transformers.EfficientNetForImageClassification(config).train()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch).logits, (batch.mean((1, 2, 3)) > 0).long())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    torch.manual_seed(0)
    module, data = Published(), torch.randn(64, 1, 32, 32)
    cause = watched(module, data).episodes()[0]
    assert (cause.statistic, cause.first) == ("weight_rms", 0)
    assert cause.layer == next(name for name, each in module.named_modules() if isinstance(each, nn.BatchNorm2d))
    namespace = {"model": Published().net, "torch": torch}
    exec(STATISTICS["weight_rms"].code_low, namespace)
    mended = Published()
    mended.net = namespace["model"]
    assert [each for each in watched(mended, data).episodes() if each.statistic.startswith("weight")] == []
