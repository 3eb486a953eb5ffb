"""A program as a user writes it, for type checkers: tests/test_user_types.py has it checked, nothing runs it.

A line that ends in an ignore comment is a mistake that must be found: the checker complains of a comment that is not
needed.
"""

from __future__ import annotations

import lightning.pytorch as pl
import pytorch_lightning
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import lightning_bn as lbn


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.norm = lbn.BatchNorm2d(8, averaging=lbn.Window(20, pooled=True))


class Polynomial(lbn.Averaging):
    """An averaging of a user's."""

    def update(self, running_mean: Tensor, running_var: Tensor, batch: lbn.Batch) -> tuple[Tensor, Tensor]:
        weight = 4 / (batch.step + 3)
        return running_mean.lerp(batch.mean, weight), running_var.lerp(batch.var, weight)


def layers(net: Net) -> None:
    """What is given comes back with its own type."""
    assert_type(lbn.convert_batch_norm(net, Polynomial()), Net)
    assert_type(lbn.settle_together(net), Net)
    assert_type(lbn.to_torch(net), Net)
    assert_type(lbn.convert_batch_norm(nn.BatchNorm2d(8), lbn.Exponential(0.1, debias=True)), nn.BatchNorm2d)
    assert_type(net.norm.averaging, lbn.Averaging | None)
    with lbn.paused_statistics(net):
        net.norm.forward(torch.zeros(2, 8, 4, 4), mask=torch.ones(2, 1, 4, 4))
    lbn.convert_batch_norm(net, lbn.Window)  # type: ignore[arg-type]  # a class and not an averaging


def trainers(net: Net) -> None:
    """The Trainer of either package takes every callback, and the plugin."""
    weights = lbn.ActivationStatsMonitor([nn.Conv2d, "backbone.*"], scalars="worst")
    compare = lbn.CompareAverages({"window": lbn.Window(20), "slow": Polynomial()}, monitor="val_acc", mode="max")
    repair = lbn.BatchNormRecalibration(when="fit_end", num_batches=None)
    guard = lbn.ModeCheck(action="raise", ignore=["BN104"], allow_eval=nn.BatchNorm2d)
    convert = lbn.ConvertBatchNorm(lbn.Cumulative())
    pl.Trainer(callbacks=[weights, compare, repair, guard, convert], plugins=[lbn.BatchNormSync()])
    pytorch_lightning.Trainer(callbacks=[weights, compare, repair, guard, convert], plugins=lbn.BatchNormSync())
    pl.Trainer(callbacks=guard)
    assert_type(repair.report, lbn.RecalibrationReport | None)
    assert_type(guard.findings, list[lbn.Finding])
    lbn.BatchNormRecalibration(when="fit_ends")  # type: ignore[arg-type]
    lbn.BatchNormRecalibration(monitor="val_loss", mode="least")  # type: ignore[arg-type]
    lbn.CompareAverages({"window": lbn.Window(20)}, mode="least")  # type: ignore[arg-type]
    lbn.ModeCheck(action="stop")  # type: ignore[arg-type]
    lbn.ActivationStatsMonitor(scalars=3)  # type: ignore[arg-type]


def loops(net: nn.Module, batches: list[Tensor]) -> None:
    """Without a Trainer."""
    report = lbn.recalibrate(net, batches, layers=["backbone.*"], num_batches=8, tolerance=0.01)
    assert_type(report, lbn.RecalibrationReport)
    assert_type([layer.samples for layer in report.layers], list[int])
    report.rollback()
    with lbn.recalibrated(net, batches) as inside:
        assert_type(inside, lbn.RecalibrationReport)
    assert_type(lbn.check(net, allow_eval="backbone"), list[lbn.Finding])
    with lbn.watch(net, action="warn") as findings:
        assert_type(findings, list[lbn.Finding])
    lbn.watch(net, action="stop")  # type: ignore[arg-type]
    for finding in findings:
        assert_type(finding.code, str)
