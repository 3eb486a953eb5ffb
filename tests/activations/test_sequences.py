"""Handwritten digits as sequences of eight rows: a channel that outgrows the others is named, and ten healthy
architectures are silent, as the monitor stands."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fitting import trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import ActivationStatsMonitor

WIDTH, WHEN, STEPS = 32, 40, 60


def digits() -> DataLoader:
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32).reshape(-1, 8, 8) / 16, torch.tensor(labels))
    return DataLoader(data, 64, shuffle=True)


class Classifier(pl.LightningModule):
    """Rows of pixels, with their places, through a body of (N, 8, WIDTH); `plant` is done before step `WHEN`."""

    def __init__(self, body: nn.Module, plant: Callable[[Classifier], None] | None = None) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(8, WIDTH), nn.Parameter(0.02 * torch.randn(8, WIDTH))
        self.body, self.head, self.plant = body, nn.Linear(WIDTH, 10), plant

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.body(self.embed(rows) + self.places).mean(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.plant is not None and self.global_step == WHEN:
            with torch.no_grad():
                self.plant(self)
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def watched(module: pl.LightningModule) -> ActivationStatsMonitor:
    monitor = ActivationStatsMonitor(verbose=False)
    trainer(monitor, max_epochs=-1, max_steps=STEPS).fit(module, digits())
    return monitor


def encoder(**options: object) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def scale_the_embedding(module: Classifier) -> None:
    for each in (module.embed.weight, module.embed.bias):
        each[5] *= 100
    module.places[:, 5] *= 100


def scale_a_block(module: Classifier) -> None:
    last = module.body.layers[0].linear2
    for each in (last.weight, last.bias):
        each[5] *= 100


def scale_a_norm(module: Classifier) -> None:
    module.body.layers[1].norm2.weight[5] *= 100


PLANTS = [
    (scale_the_embedding, True, ("body.layers.0.norm1", "body.layers.0:add[1]")),
    (scale_a_block, True, ("body.layers.0:add[2]",)),
    (scale_a_block, False, ("body.layers.0:add[2]",)),
    (scale_a_norm, True, ("body.layers.1.norm2",)),
    (scale_a_norm, False, ("body.layers.1.norm2",)),
]


@pytest.mark.parametrize(("plant", "norm_first", "rows"), PLANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_channel_that_is_scaled_by_100_is_named_with_row_and_step(
    plant: Callable[[Classifier], None], norm_first: bool, rows: tuple[str, ...], seed: int
) -> None:
    """The verdict begins with the first residual sum, or the norm, that has it, and the step."""
    torch.manual_seed(seed)
    monitor = watched(Classifier(encoder(norm_first=norm_first, activation="gelu"), plant))
    told = monitor.verdict()[0]
    expected = tuple(f"{row}: ratio of the largest channel's root mean square" for row in rows)
    assert told.partition(": ")[2].startswith(expected), told
    assert monitor.episodes()[0].first == WHEN


class Rotary(nn.Module):
    """A block of today's language models: RMS norms first, and a gated linear unit."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, bias=False, batch_first=True)
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.triu(torch.ones(8, 8, dtype=torch.bool), 1)
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        normed = self.norm2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Parallel(nn.Module):
    """Attention and multilayer perceptron beside each other, behind one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.attention(normed, normed, normed, need_weights=False)[0] + self.mlp(normed)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.tokens = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.channels = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class LayerScaled(nn.Module):
    """A depthwise convolution, a layer norm and a branch whose scale begins with almost nothing (ConvNeXt)."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.scale = nn.Parameter(torch.full((WIDTH,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.mlp(self.norm(self.depthwise(x.transpose(1, 2)).transpose(1, 2)))


class Convolutional(nn.Module):
    """Residual blocks of convolutions and batch norms, with functional ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm1d(WIDTH)
        self.conv2, self.bn2 = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out = x.transpose(1, 2)
        return F.relu(out + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(out)))))).transpose(1, 2)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(4, WIDTH), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.norm(self.conv(x.transpose(1, 2)))).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.norm = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.cell(x)[0])


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "encoder, norms behind": encoder,
    "encoder, norms first": lambda: encoder(norm_first=True, activation="gelu"),
    "decoder, RMS norms, gated": lambda: nn.Sequential(Rotary(), Rotary(), nn.RMSNorm(WIDTH)),
    "parallel": lambda: nn.Sequential(Parallel(), Parallel(), nn.LayerNorm(WIDTH)),
    "mixer": lambda: nn.Sequential(Mixer(), Mixer(), nn.LayerNorm(WIDTH)),
    "layer scale": lambda: nn.Sequential(LayerScaled(), LayerScaled()),
    "convolutional": lambda: nn.Sequential(Convolutional(), Convolutional()),
    "group norms": lambda: nn.Sequential(Grouped(), Grouped()),
    "recurrent": lambda: nn.Sequential(Recurrent(), Recurrent()),
    "perceptron": lambda: nn.Sequential(
        nn.Linear(WIDTH, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU()
    ),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_healthy_architectures_are_silent(name: str, seed: int) -> None:
    """No episode in sixty steps, and a verdict that says so."""
    torch.manual_seed(seed)
    monitor = watched(Classifier(ARCHITECTURES[name]()))
    assert monitor.episodes() == []
    assert monitor.verdict()[0].startswith("Healthy: ")
