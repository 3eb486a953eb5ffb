"""Each rule about statistics that do not fit the weights or the batches: the real mistake in a real run, and the
nearest legitimate thing, of which nothing is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from found import findings, of, only, serious
from lightning.pytorch.callbacks import WeightAveraging
from small_data import data
from small_models import Block, Module
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import (
    BatchNormRecalibration,
    Finding,
    Window,
    convert_batch_norm,
)

LAYERS = ("model.backbone.0.1", "model.backbone.1.1", "model.head.2")


class TestBN207:
    def test_averaged_weights_without_buffers(self) -> None:
        """Averaged weights are validated with the statistics of the weights they are not."""
        finding = only("BN207", findings(Module(), WeightAveraging(use_buffers=False), max_epochs=2))
        assert (finding.level, finding.layers) == ("error", LAYERS)
        assert "BatchNormRecalibration" in finding.message

    def test_at_the_end_of_the_fit(self) -> None:
        """Without a validation it is seen when the averaged weights stay."""
        found = findings(Module(), WeightAveraging(use_buffers=False), limit_val_batches=0)
        assert only("BN207", found).layers == LAYERS

    def test_averaged_buffers(self) -> None:
        """With averaged buffers the statistics are those of the average, near enough."""
        assert serious(findings(Module(), WeightAveraging(use_buffers=True), max_epochs=2)) == []

    def test_recalibrated(self) -> None:
        """With this package's recalibration the statistics are those of the averaged weights."""
        recalibration = BatchNormRecalibration(when="validation")
        assert serious(findings(Module(), WeightAveraging(use_buffers=False), recalibration, max_epochs=2)) == []


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


def gap_findings(module: Module) -> list[Finding]:
    """Train 192 batches in three epochs, so that nothing is left of the start, and return what BN208 says above
    information at the end."""
    found = of("BN208", findings(module, loader=data(batches=64), max_epochs=3))
    return [finding for finding in found if finding.level != "info" and finding.step == 192]


class TestBN208:
    def test_statistics_that_lag(self) -> None:
        """Statistics far from the last batches' are named, the worst layer first, with the two ways out."""
        (finding,) = gap_findings(Jump(20.0))
        assert (finding.level, finding.stage, finding.layers) == ("warning", "validate", ("model.backbone.0.1",))
        assert "Window" in finding.message
        assert "BatchNormRecalibration" in finding.message

    def test_no_jump(self) -> None:
        """The same run without the jump is fine."""
        assert gap_findings(Jump(1.0)) == []

    def test_a_gap_within_bounds(self) -> None:
        """A jump that leaves the variance within a factor of two is fine: 1.3**2 is 1.69."""
        assert gap_findings(Jump(1.3)) == []

    def test_an_average_that_follows(self) -> None:
        """With a momentum that has forgotten the old weights by the end of the epoch, the same jump is fine."""
        assert gap_findings(Jump(20.0, momentum=0.3)) == []

    def test_cold_start_is_information(self) -> None:
        """While the start of the average still weighs, a gap is what one must expect."""
        found = of("BN208", findings(Module(nn.Sequential(Block(1, 4), nn.Flatten(), nn.Linear(64, 2)))))
        assert {finding.level for finding in found} == {"info"}

    @pytest.mark.parametrize(("small", "levels"), [(12, set()), (36, {"warning"})])
    def test_small_variances(self, small: int, levels: set[str]) -> None:
        """In a small variance the initial 1 can be seen long after it is forgotten: of a third of the features, as of
        those that are rarely there, nothing is said at the first validation, and of all it is."""
        scale = torch.ones(36).index_fill(0, torch.arange(small), 0.02)
        images = torch.randn(16 * 40, 1, 6, 6) * scale.reshape(6, 6)
        loader = DataLoader(TensorDataset(images, torch.arange(len(images)) % 2), 16)
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 2))
        found = [each for each in findings(Module(model), loader=loader) if each.code == "BN208"]
        assert {each.level for each in found if each.stage == "validate"} == levels

    def test_a_window_is_left_out(self) -> None:
        """A window's buffers don't tell the latest batches, and nothing is made up."""
        module = Jump(20.0)
        convert_batch_norm(module, Window(40))
        assert gap_findings(module) == []
