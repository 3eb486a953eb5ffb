"""Batch norms that pruning changes in the middle of a run."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from fitting import fit
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import prune

from lightning_bn import ActivationStatsMonitor
from lightning_bn.activations.collector import LayerCollector


class Wide(pl.LightningModule):
    """Two norms, of which a pruning callback takes weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)
        )
        for norm, start in ((self.net[1], 1.0), (self.net[4], 10.0)):
            nn.init.constant_(norm.weight, start)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_lightnings_pruning_beside_the_monitor() -> None:
    """Each norm's row has the range of its own pruned weights, where torch keeps them under another name."""
    monitor = ActivationStatsMonitor(every_n_steps=1, verbose=False)
    fit(ModelPruning("l1_unstructured", amount=0.5, use_global_unstructured=False), monitor, module=Wide(), val=None)
    rows = {row["layer"]: row for row in monitor.table() if row["epoch"] == 1}
    for layer, start in (("net.1", 1.0), ("net.4", 10.0)):
        assert (rows[layer]["weight_min"], rows[layer]["weight_max"], rows[layer]["bias_max"]) == (0.0, start, 0.0)


def test_one_pruned_norm_of_two() -> None:
    """The other one's weights are not taken for its own."""
    model = Wide().net
    prune.random_unstructured(model[1], "weight", amount=2)
    collector = LayerCollector(model, {"1": model[1], "4": model[4]})
    collector.attach()
    model(torch.randn(8, 4))
    collector.detach()
    rows = collector.collect().rows
    assert (rows["1"]["weight_min"], rows["1"]["weight_max"]) == (0.0, 1.0)
    assert (rows["4"]["weight_min"], rows["4"]["weight_max"]) == (10.0, 10.0)


def test_channels_that_are_cut_off_between_two_samples() -> None:
    """The next sample is that of the smaller layer, with its own weights and its drift."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
    collector = LayerCollector(model, {"1": model[1], "2": model[2]})
    for width, name in ((6, "1"), (4, "1[4]")):
        linear, norm = model[0], model[1]
        linear.weight, linear.bias = (nn.Parameter(each[:width].detach()) for each in (linear.weight, linear.bias))
        norm.weight, norm.bias = (nn.Parameter(torch.full((width,), float(width))) for _ in range(2))
        norm.running_mean, norm.running_var = torch.zeros(width), torch.ones(width)
        norm.num_features = width
        collector.attach()
        data = torch.randn(64, 4)
        model(data)
        collector.detach()
        row = collector.collect().rows[name]
        batch = data @ linear.weight.T + linear.bias
        assert (row["weight_min"], row["weight_max"]) == (width, width)
        expected = batch.mean(0).square().mean().sqrt().item()
        assert abs(row["drift_mean"] - expected) < 1e-4 * expected
