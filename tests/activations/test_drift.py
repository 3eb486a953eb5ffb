"""Drift read from the buffers, against the batches themselves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_bn import (
    Averaging,
    BatchNorm1d,
    BatchNorm2d,
    Cumulative,
    Exponential,
    Window,
    convert_batch_norm,
    settle_together,
)
from lightning_bn.activations.drift import DriftMeter
from lightning_bn.activations.registry import DRIFT_STATISTICS


def oracle(batch: Tensor, running_mean: Tensor, running_var: Tensor, eps: float) -> list[float]:
    """Rms and max over channels of both distances, by loops over floats."""
    shifts, ratios = [], []
    for channel in range(batch.shape[1]):
        values = batch[:, channel].double().flatten().tolist()
        mean = math.fsum(values) / len(values)
        var = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        scale = running_var[channel].item() + eps
        shifts.append((mean - running_mean[channel].item()) / math.sqrt(scale))
        ratios.append(math.log((var + eps) / scale))

    def rms(numbers: list[float]) -> float:
        return math.sqrt(sum(number**2 for number in numbers) / len(numbers))

    return [rms(shifts), max(map(abs, shifts)), rms(ratios), max(map(abs, ratios))]


LAYERS = {
    "torch's": lambda: nn.BatchNorm1d(3),
    "torch's, small momentum": lambda: nn.BatchNorm1d(3, momentum=0.01),
    "torch's, cumulative": lambda: nn.BatchNorm1d(3, momentum=None),
    "ours": lambda: BatchNorm1d(3),
    "exponential": lambda: BatchNorm1d(3, averaging=Exponential(0.3)),
    "exponential, debiased": lambda: BatchNorm1d(3, averaging=Exponential(0.2, debias=True)),
    "cumulative": lambda: BatchNorm1d(3, averaging=Cumulative()),
    "window": lambda: BatchNorm1d(3, averaging=Window(4)),
    "window, odd": lambda: BatchNorm1d(3, averaging=Window(5)),
    "window, pooled": lambda: BatchNorm1d(3, averaging=Window(3, pooled=True)),
    "window of one": lambda: BatchNorm1d(3, averaging=Window(1)),
    "window in bfloat16": lambda: BatchNorm1d(3, averaging=Window(4)).bfloat16(),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_drift_is_that_of_the_batch(kind: str, device: torch.device) -> None:
    """At each of a dozen steps the drift read from the buffers is that of the batch to the running statistics before
    it."""
    layer = LAYERS[kind]().to(device)
    meter = DriftMeter([layer])
    assert meter.unreadable() == []
    for step in range(12):
        mean, var = layer.running_mean.clone(), layer.running_var.clone()
        batch = torch.randn(16, 3) * torch.tensor([1.0, 2.0, 0.1]) + 2 * step
        batch = batch.to(layer.running_mean.dtype)
        meter.start()
        layer(batch.to(device))
        tolerance = 2e-2 if layer.running_mean.dtype == torch.bfloat16 else 1e-3
        assert meter.measure().values[0].tolist() == pytest.approx(
            oracle(batch, mean, var, layer.eps), rel=tolerance, abs=1e-4
        ), step


def test_layers_of_all_kinds_and_widths_at_once() -> None:
    """Many layers together give what each gives alone."""
    layers = [build() for name, build in LAYERS.items() if "bfloat16" not in name]
    layers += [nn.BatchNorm2d(5), BatchNorm2d(7, averaging=Window(4)), nn.BatchNorm1d(1)]
    alone = [DriftMeter([layer]) for layer in layers]
    together = DriftMeter(layers)
    for _ in range(3):
        for meter in (*alone, together):
            meter.start()
        for layer in layers:
            shape = (8, layer.num_features, 2, 2) if isinstance(layer, nn.BatchNorm2d) else (8, layer.num_features)
            layer(torch.randn(shape) + 1)
        np.testing.assert_allclose(
            together.measure().values, np.concatenate([meter.measure().values for meter in alone]), rtol=1e-9, atol=1e-9
        )


def test_several_batches_are_their_average() -> None:
    """Between start and measure, gradient accumulation runs several batches: drift is that of what they were on
    average."""
    layer = nn.BatchNorm1d(3, momentum=None)
    layer(torch.randn(50, 3))
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    meter = DriftMeter([layer])
    meter.start()
    batches = [torch.randn(20, 3) + 3 for _ in range(4)]
    for batch in batches:
        layer(batch)
    expected_mean = torch.stack([batch.double().mean(0) for batch in batches]).mean(0)
    expected_var = torch.stack([batch.double().var(0) for batch in batches]).mean(0)
    shift = (expected_mean - mean) / (var + layer.eps).sqrt()
    ratio = ((expected_var + layer.eps) / (var + layer.eps)).log()
    found = dict(zip(DRIFT_STATISTICS, meter.measure().values[0].tolist(), strict=True))
    assert found["drift_mean"] == pytest.approx(shift.square().mean().sqrt().item(), rel=1e-4)
    assert found["drift_var_max"] == pytest.approx(ratio.abs().max().item(), rel=1e-3)


@pytest.mark.parametrize("still", ["eval", "no batch", "NaN batch"])
def test_statistics_that_stand_still_have_no_drift(still: str) -> None:
    """A layer that took no batch in has no drift: NaN, and neither 0 nor infinity."""
    layer = BatchNorm1d(3, averaging=Window(4))
    layer(torch.randn(8, 3))
    meter = DriftMeter([layer])
    meter.start()
    if still == "eval":
        layer.eval()(torch.randn(8, 3))
    elif still == "NaN batch":
        layer(torch.full((8, 3), math.nan))
    found = meter.measure()
    assert np.isnan(found.values).all()
    assert not found.ran.any()


class Polynomial(Averaging):
    """A third-party averaging, which tells nothing about its newest batch."""

    def update(self, running_mean: Tensor, running_var: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        weight = 4 / (batch.step + 3)
        return running_mean.lerp(batch.mean, weight), running_var.lerp(batch.var, weight)


def test_what_nothing_tells_is_handed_in() -> None:
    """torch's layer in 16 bits says so; given the batches' moments, its drift is that of the mean of the batches that
    are finite."""
    layer = nn.BatchNorm1d(3).bfloat16()
    meter = DriftMeter([nn.BatchNorm1d(2), layer])
    assert meter.unreadable() == [1]
    meter.layers[0](torch.randn(4, 2))
    batch = (torch.randn(16, 3) + 1).to(layer.running_mean.dtype)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    meter.start()
    layer(batch)
    wide = batch.double()
    nothing = torch.full((3,), torch.nan)
    for moments in ((wide.mean(0) - 1, wide.var(0)), (nothing, nothing), (wide.mean(0) + 1, wide.var(0))):
        meter.hand_in([(1, *moments)])
    assert meter.measure().values[1].tolist() == pytest.approx(oracle(batch, mean, var, layer.eps), rel=1e-4)


@pytest.mark.parametrize(
    "averaging",
    [Window(3), Exponential(0.1, pooled=True), Cumulative(pooled=True), Polynomial()],
    ids=lambda rule: type(rule).__name__,
)
def test_layers_of_this_package_tell_of_their_batches(averaging: Averaging) -> None:
    """By themselves and in a model, whatever their average; several batches count as their mean, one that is not finite
    not at all."""
    for wrap in (lambda layer: layer, lambda layer: settle_together(nn.Sequential(nn.Identity(), layer))):
        layer = BatchNorm1d(3, averaging=averaging)
        model = wrap(layer)
        model(torch.randn(8, 3))
        meter = DriftMeter([layer])
        assert meter.unreadable() == []
        mean, var = layer.running_mean.clone(), layer.running_var.clone()
        batch = torch.randn(16, 3) + 1
        meter.start()
        for each in (batch - 0.5, batch * torch.nan, batch + 0.5):
            model(each)
        assert meter.measure().values[0].tolist() == pytest.approx(oracle(batch, mean, var, layer.eps), rel=1e-4)
        before = dict(layer.__dict__)
        meter.start()
        meter.close()
        assert set(layer.__dict__) == set(before), "something was left on the layer"


def test_a_served_subclass_is_read_too() -> None:
    """SyncBatchNorm and subclasses of other packages with an averaging are read like this package's layers."""

    class Quiet(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    layer = convert_batch_norm(Quiet(3), Window(4))
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    meter = DriftMeter([layer])
    meter.start()
    batch = torch.randn(16, 3) + 1
    layer(batch)
    assert meter.measure().values[0].tolist() == pytest.approx(oracle(batch, mean, var, layer.eps), rel=1e-4)


def test_measure_before_start_is_told() -> None:
    """The order of calls is checked."""
    with pytest.raises(RuntimeError, match="call start"):
        DriftMeter([nn.BatchNorm1d(2)]).measure()
    assert DriftMeter([]).measure().values.shape == (0, 4)


@pytest.mark.parametrize(
    "kind", ["torch's", "torch's, small momentum", "exponential, debiased", "window", "cumulative"]
)
def test_the_start_is_told_from_a_change(kind: str) -> None:
    """Against batches that never change, drift is wholly explained by the 0/1 start, at every step and momentum;
    against ones that do, it is not."""
    layer = LAYERS[kind]()
    meter = DriftMeter([layer])
    data = torch.randn(400, 3) * 0.05 + 7
    for step in range(60):
        meter.start()
        layer(data + (3 if step == 59 else 0))
        found = meter.measure()
        if step == 0:
            assert found.values[0].max() > 1
        if step < 59:
            assert found.settled[0].max() < 0.02, step
        else:
            assert found.settled[0].max() > 1
    assert found.nonfinite.tolist() == [0]
    layer.running_var[1] = math.inf
    meter.start()
    layer(data)
    assert meter.measure().nonfinite.tolist() == [1]


def test_statistics_of_another_origin_are_no_start() -> None:
    """A pretrained layer whose count was lost is not taken for one that began with 0/1."""
    layer = nn.BatchNorm1d(3)
    layer.running_mean.fill_(5.0)
    meter = DriftMeter([layer])
    for _ in range(3):
        meter.start()
        layer(torch.randn(400, 3) * 0.05 + 7)
        found = meter.measure()
        np.testing.assert_array_equal(found.settled, found.values)


def test_an_evaluation_excuses_a_young_model_and_no_slow_average() -> None:
    """After ten batches the start explains what torch's own average lags behind, and not what a slower one does."""
    batches = [torch.randn(400, 3) * 0.05 + 7 for _ in range(10)]
    inputs = {0: (batches[0].mean(0).double().numpy(), batches[0].var(0).double().numpy())}
    for momentum, excused in ((0.1, True), (0.01, False)):
        layer = nn.BatchNorm1d(3, momentum=momentum)
        for batch in batches:
            layer(batch)
        meter = DriftMeter([layer])
        found = meter.against(meter.statistics(), inputs)
        assert found.values[0, 0] > 1
        assert (found.settled[0, 0] < 0.1) == excused
