"""Sicknesses planted in a network built as people write them: each is named first, where it is, at the next sample; and
healthy networks are called healthy from their first sample on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fitting import trainer
from healthy_networks import NETWORKS, Basic, head, stem
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_bn import ActivationStatsMonitor, Episode
from lightning_bn.activations.collector import LayerCollector
from lightning_bn.activations.episodes import causes
from lightning_bn.activations.sample_to_table import LayerTable
from lightning_bn.activations.watched_layers import select_layers

WHEN, EVERY = 5, 2


def images(size: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 4)


class Network(pl.LightningModule):
    """Two residual blocks with one ReLU for two places each, and a sigmoid gate; `plant` is done at step `WHEN`."""

    def __init__(self, plant: Callable[[Network], None] | None = None, at: int = WHEN) -> None:
        super().__init__()
        self.stem, self.block1, self.block2 = nn.Sequential(*stem(16)), Basic(16, 16), Basic(16, 32, 2)
        self.gate, self.sigmoid, self.head = nn.Linear(32, 32), nn.Sigmoid(), head(32)
        self.plant, self.at = plant, at
        self.change: Callable[[Tensor], Tensor] = lambda x: x
        self.change_val: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.stem(x)))
        gate = self.sigmoid(self.gate(x.mean((2, 3))))
        return self.head(x * gate[:, :, None, None])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.plant is not None and self.global_step == self.at:
            with torch.no_grad():
                self.plant(self)
        return F.cross_entropy(self(self.change(batch[0])), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(self.change_val(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(module: pl.LightningModule, **options: Any) -> ActivationStatsMonitor:
    monitor = ActivationStatsMonitor(every_n_steps=EVERY, gradients=True, heatmaps=False, verbose=False)
    runner = trainer(monitor, max_epochs=2, num_sanity_val_steps=0, **options)
    runner.fit(module, DataLoader(images(192, 0), 32), DataLoader(images(96, 1), 32))
    return monitor


def found(plant: Callable[[Network], None] | None, at: int = WHEN) -> list[Episode]:
    torch.manual_seed(0)
    return fit(Network(plant, at), limit_val_batches=0).episodes()


def fill(norm: str, weight: float | None = None, bias: float | None = None, channels: Any = slice(None)) -> Any:
    def plant(module: Network) -> None:
        layer = module.get_submodule(norm)
        if weight is not None:
            layer.weight[channels] = weight
        if bias is not None:
            layer.bias[channels] = bias

    return plant


def input_of(change: Callable[[Tensor], Tensor]) -> Any:
    return lambda module: setattr(module, "change", change)


def without_one_channel(x: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, 1:]), 1)


def with_nan(x: Tensor) -> Tensor:
    return torch.where(torch.arange(len(x)).reshape(-1, 1, 1, 1) == 3, math.nan, x)


# What is planted; the row and the statistic that are named first.
SICK: dict[str, tuple[Callable[[Network], None], str, str]] = {
    "the first use of a shared ReLU dies": (fill("block1.bn1", None, -100.0), "block1.relu#1", "dead_fraction"),
    "the second use of one": (fill("block1.bn2", 0.1, -100.0), "block1.relu#2", "dead_fraction"),
    "the stem's ReLU dies": (fill("stem.1", None, -100.0), "stem.2", "dead_fraction"),
    "a third of a layer's channels die": (
        fill("block2.bn1", None, -100.0, slice(11)),
        "block2.relu#1",
        "dead_fraction",
    ),
    "one channel of 16 dies": (fill("block1.bn1", None, -100.0, 3), "block1.relu#1", "died_channels"),
    "one channel of 32 dies": (fill("block2.bn1", None, -100.0, 30), "block2.relu#1", "died_channels"),
    "one channel explodes": (fill("block2.bn2", 3e3, None, 7), "block2.bn2", "channel_rms_max"),
    "a layer explodes": (fill("block1.bn2", 1e5), "block1.bn2", "std"),
    "a layer vanishes": (fill("block2.downsample.1", 1e-5, 0.0), "block2.downsample.1", "weight_near_zero"),
    "weights become NaN": (
        lambda module: module.block2.conv1.weight.fill_(math.nan),
        "block2.bn1",
        "running_nonfinite",
    ),
    "one weight becomes infinite": (
        lambda module: module.block1.conv2.weight.view(-1)[:1].fill_(math.inf),
        "block1.bn2",
        "running_nonfinite",
    ),
    "running statistics become NaN": (
        lambda module: module.block1.bn1.running_var.fill_(math.nan),
        "block1.bn1",
        "running_nonfinite",
    ),
    "one running mean becomes infinite": (
        lambda module: module.block2.bn2.running_mean[:1].fill_(math.inf),
        "block2.bn2",
        "running_nonfinite",
    ),
    "the gate saturates": (lambda module: module.gate.bias.fill_(20.0), "sigmoid", "saturated_fraction"),
    "the input has NaN": (input_of(with_nan), "input", "nonfinite"),
    "a channel of the input is constant": (input_of(without_one_channel), "input", "constant_channels"),
    "most weights of a norm go to zero": (fill("block1.bn1", 1e-4, 0.0), "block1.bn1", "weight_near_zero"),
    "no gradient arrives": (lambda module: module.head[2].weight.zero_().requires_grad_(False), "stem.1", "grad_std"),
}


@pytest.mark.parametrize("sickness", SICK)
def test_a_sickness_is_named_first(sickness: str) -> None:
    """The earliest and most upstream episode is the planted one's, within one sampling interval; before, there is
    none."""
    plant, layer, statistic = SICK[sickness]
    first = found(plant)[0]
    assert (first.layer, first.statistic, first.stage) == (layer, statistic, "train")
    assert WHEN <= first.first <= WHEN + EVERY


@pytest.mark.parametrize(
    ("channels", "statistic", "first"),
    [(3, "died_channels", 0), (slice(5), "dead_fraction", 0), (slice(None), "dead_fraction", 2 * EVERY)],
    ids=["one channel", "a third", "all"],
)
def test_what_is_dead_from_the_start_is_named(channels: Any, statistic: str, first: int) -> None:
    """A channel that has never fired counts, also by itself; a whole layer might be initialised with zero, and counts
    from the third sample on."""
    episode = found(fill("block1.bn1", None, -100.0, channels), at=0)[0]
    assert (episode.layer, episode.statistic, episode.first) == ("block1.relu#1", statistic, first)


def test_the_planted_network_is_healthy_without_a_plant() -> None:
    """What the tests above rest on."""
    assert found(None) == []


class Plain(Network):
    """The same without batch norm; an optimizer step whose gradient is not finite may be skipped, as a loss scaler
    does."""

    def __init__(self, plant: Callable[[Network], None], at: int, skips: bool) -> None:
        super().__init__(plant, at)
        self.skips = skips
        for name, module in list(self.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                holder, _, own = name.rpartition(".")
                setattr(self.get_submodule(holder), own, nn.Identity())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.skips:
            for parameter in self.parameters():
                if parameter.grad is not None and not parameter.grad.isfinite().all():
                    parameter.grad = None


@pytest.mark.parametrize(
    ("at", "skips", "layer"),
    [(WHEN - 1, False, "block2.relu#1"), (WHEN, True, "block2.relu#1"), (WHEN, False, "stem.2")],
    ids=["at a sampled step", "between two, step skipped", "between two"],
)
def test_nan_without_batch_norm(at: int, skips: bool, layer: str, tmp_path: Path) -> None:
    """Named where it begins, as long as weights tell; once an optimizer step has made NaN of all weights, the first
    layer in forward order is named, and that and how the origin is lost. No scalar of NaN activations is a number."""
    torch.manual_seed(0)
    module = Plain(lambda module: module.block2.conv1.weight.view(-1)[:1].fill_(math.nan), at, skips)
    monitor = fit(module, limit_val_batches=0, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    first = monitor.episodes()[0]
    assert (first.layer, first.statistic, first.first) == (layer, "nonfinite", at if at % EVERY == 0 else at + 1)
    is_lost = "came after step 4, between two samples" in monitor.verdict()[2]
    assert is_lost == (layer == "stem.2")
    assert sum(line.startswith(("Sick", "Was sick")) for line in monitor.verdict()) == 1
    metrics = pd.read_csv(next(tmp_path.rglob("metrics.csv")), keep_default_na=False, dtype=str).set_index("step")
    for name in ("std", "abs_max", "zero_fraction", "dead_fraction", "saturated_fraction", "grad_std"):
        told = metrics[f"activations/{name}/worst"]
        assert told["10"] == "nan" != told["0"]


class InTurn(Network):
    """Something is planted at each of several steps."""

    def __init__(self, plants: dict[int, Callable[[Network], None]]) -> None:
        super().__init__(lambda module: self.plants[module.global_step](module))
        self.plants = plants

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.at = self.global_step if self.global_step in self.plants else -1
        return super().training_step(batch, batch_idx)


def larger(factor: float) -> Any:
    """All convolutions of the blocks that many times as large, without batch norm to hold it."""

    def plant(module: Network) -> None:
        for layer in (module.block1, module.block2):
            for each in layer.modules():
                if isinstance(each, nn.Conv2d):
                    each.weight *= factor

    return plant


# What befalls the network; the row and the statistic that come first; how many causes there are.
TOGETHER: dict[str, tuple[Callable[[], Network], str, str]] = {
    # A layer's channels begin to die before the layer counts as dead, and so do those below it.
    "a lone channel downstream, then a layer": (
        lambda: InTurn({3: fill("block2.bn1", None, -100.0, 30), 5: fill("block1.bn1", None, -100.0)}),
        "block1.relu#1",
        "dead_fraction",
    ),
    "two layers in one interval": (
        lambda: InTurn({5: fill("block2.bn1", None, -100.0), 6: fill("block1.bn1", None, -100.0)}),
        "block1.relu#1",
        "dead_fraction",
    ),
    # 40 times in each of block1's two convolutions is not yet 1000 times what the small weights made before.
    "the scale grows layer by layer": (lambda: Plain(larger(40.0), 5, False), "block2.relu#1", "std"),
    "a lone channel and the layer below it": (
        lambda: InTurn({5: fill("stem.1", None, -100.0, 3), 6: fill("block1.bn1", None, -100.0)}),
        "block1.relu#1",
        "dead_fraction",
    ),
}


@pytest.mark.parametrize("what", TOGETHER)
def test_the_cause_of_many_comes_first(what: str) -> None:
    """Of what begins within one sampling interval the most upstream that befalls a whole layer; the rest follows."""
    build, layer, statistic = TOGETHER[what]
    torch.manual_seed(0)
    monitor = fit(build(), limit_val_batches=0)
    first = monitor.episodes()[0]
    assert (first.layer, first.statistic, first.first) == (layer, statistic, 6)
    told = [line for line in monitor.verdict() if line.startswith(("Sick", "Was sick"))]
    assert len(told) == (2 if what == "a lone channel and the layer below it" else 1), told


def test_a_cause_that_is_over_has_followers_at_the_next_sample() -> None:
    """Activations explode once; the step that their gradient makes kills a layer above, which the next sample finds,
    and by way of that layer another becomes NaN. A layer that vanishes long after is a cause of its own."""
    explosion = Episode("relu7", "std", 0, 0, 1e13, True, value=1e13, limit=1e3, order=7)
    death = Episode("relu1", "dead_fraction", 2, 8, 1.0, True, limit=0.25, order=1, before=0)
    scale = Episode("relu3", "std", 4, 10, 1e4, True, limit=1e3, order=3, before=2)
    nan = Episode("relu2", "nonfinite", 8, 12, 9.0, True, limit=0.0, order=2, before=6)
    other = Episode("relu5", "std", 40, 44, 1e-9, False, limit=1e-3, order=5, before=38)
    found = causes([other, nan, scale, death, explosion])
    assert [(each.episode, each.followers) for each in found] == [(explosion, (death, scale, nan)), (other, ())]


@pytest.mark.parametrize(
    ("change", "statistic"),
    [
        (lambda x: x * 64 + 128, "input_shift"),
        (lambda x: x + 183, "input_shift"),
        (lambda x: x * 5, "input_log_ratio"),
        (without_one_channel, "constant_channels"),
        (with_nan, "nonfinite"),
    ],
    ids=["0 to 255", "183 deviations off", "another scale", "constant channel", "NaN"],
)
def test_a_validation_is_given_something_else(change: Callable[[Tensor], Tensor], statistic: str) -> None:
    """The first validation names its input, and what follows in the layers is grouped below it."""
    torch.manual_seed(0)
    module = Network()
    module.change_val = change
    monitor = fit(module)
    first = monitor.episodes()[0]
    assert (first.layer, first.statistic, first.stage, first.first) == ("input", statistic, "val", 5)
    assert sum(line.startswith(("Sick", "Was sick")) for line in monitor.verdict()) == 1


def test_a_slow_average_is_an_illness_when_an_evaluation_reads_it() -> None:
    """A momentum of 0.001 is in warm-up in training, and sick in validation."""
    torch.manual_seed(0)
    module = Network()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.001
    monitor = fit(module)
    assert {(each.stage, each.statistic) for each in monitor.episodes()} <= {
        ("val", "drift_mean"),
        ("val", "drift_var"),
    }
    assert monitor.episodes()[0].first == 5
    assert any("drift" in row["warm_up"] for row in monitor.table() if row["stage"] == "train")


NETWORKS |= {
    "transformers' ResNet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], layer_type="bottleneck", num_labels=4)
    ),
    "transformers' basic ResNet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    ),
    "transformers' RegNet": lambda: RegNetForImageClassification(
        RegNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], groups_width=8, num_labels=4)
    ),
    "transformers' MobileNetV2": lambda: MobileNetV2ForImageClassification(
        MobileNetV2Config(depth_multiplier=0.1, min_depth=8, num_labels=4)
    ),
    "transformers' ViT": lambda: ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=4,
            num_labels=4,
        )
    ),
}


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 4, (16,), generator=generator)
    return torch.randn(16, 3, 16, 16, generator=generator) + labels.reshape(-1, 1, 1, 1) * 0.5 - 0.75, labels


@pytest.mark.parametrize("name", NETWORKS)
def test_a_healthy_network_has_no_episode(name: str) -> None:
    """From its first step on, in training, gradients included, and in validation; some in warm-up."""
    torch.manual_seed(0)
    model, generator = NETWORKS[name](), torch.Generator().manual_seed(1)
    layers = select_layers(model)
    training = LayerCollector(model, layers, gradients=True)
    validation = LayerCollector(model, layers, training=False)
    table, optimizer = LayerTable(), torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(60 if name in ("residual", "dense") else 16):
        data, labels = batch(generator)
        training.attach()
        output = model(data)
        output = getattr(output, "logits", output)
        loss = F.cross_entropy(output, labels) if output.dim() == 2 else output.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        training.detach()
        table.append("train", step, 0, training.collect())
        if step % 8 == 7:
            model.eval()
            validation.forget_channels()
            validation.attach()
            with torch.no_grad():
                model(batch(generator)[0])
            validation.detach()
            table.append("val", step, 0, validation.collect(training))
            model.train()
    assert table.episodes() == []
    assert table.verdict()[0].startswith("Healthy: ")
