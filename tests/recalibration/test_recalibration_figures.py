"""The figures of a pass: every cut of the data gives the statistics of the whole; and when a pass may stop."""

from __future__ import annotations

import json
import math

import oracles
import pytest
import torch
from digits import ConvNet, digits
from recalibration_models import close, estimate, statistics, three
from states import as_bytes
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import recalibrated

CUTS = [[60], [30, 30], [2] * 30, [1] * 60, [7] * 8 + [4], [59, 1], [2, 2, 4, 8, 16, 28]]


@pytest.mark.parametrize("layout", ["rows", "images", "channels_last"])
@pytest.mark.parametrize("sizes", CUTS, ids=str)
def test_the_first_layers_statistics_are_those_of_the_whole_data_for_any_cut(sizes: list[int], layout: str) -> None:
    """To 1e-6, batches of one included."""
    data = torch.randn(60, 4, *(() if layout == "rows" else (5, 3))) * torch.tensor([0.1, 1.0, 5.0, 2.0]).view(
        -1, *[1] * (layout != "rows") * 2
    )
    if layout == "channels_last":
        data = data.contiguous(memory_format=torch.channels_last)
    layer = nn.BatchNorm1d(4) if layout == "rows" else nn.BatchNorm2d(4)
    estimate(layer, data.split(sizes))
    mean, var = oracles.mean_and_unbiased_variance(oracles.channels(data))
    assert ((layer.running_mean.double() - torch.tensor(mean)).abs() / torch.tensor(var).sqrt()).max() < 1e-6
    assert (layer.running_var.double() / torch.tensor(var) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", [(4000, 3), (400, 3, 4, 5), (400, 3, 20)])
def test_a_large_mean_does_not_drown_the_variance(shape: tuple[int, ...], exact: bool) -> None:
    """Mean 1000, standard deviation 0.01: E[x^2]-E[x]^2 in float32 says 0 or anything."""
    data = 1000 + 0.01 * torch.randn(shape)
    layouts = [data, data.contiguous(memory_format=torch.channels_last)] if len(shape) == 4 else [data]
    for layout in layouts:
        layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](3)
        estimate(layer, layout.split(70), exact=exact)
        _, var = oracles.mean_and_unbiased_variance(oracles.channels(data))
        assert (layer.running_var.double() / torch.tensor(var) - 1).abs().max() < 1e-3


def test_pooled_says_which_variance() -> None:
    """True, of all the data together, the spread between batches included; False, the average of the unbiased
    within-batch variances."""
    data = torch.randn(40, 3) + torch.arange(40.0).unsqueeze(1)
    for pooled in (True, False):
        layer = nn.BatchNorm1d(3)
        estimate(layer, data.split(12), pooled=pooled)
        close(layer, *oracles.cumulative([oracles.channels(part) for part in data.split(12)], pooled))


def test_half_precision_layers_are_measured_in_float32() -> None:
    """The moments of bfloat16 data are exact to the rounding of the buffer."""
    layer = nn.BatchNorm2d(3).bfloat16()
    data = (torch.randn(64, 3, 4, 4) * 3 + 10).bfloat16()
    estimate(layer, data.split(10))
    mean, var = oracles.mean_and_unbiased_variance(oracles.channels(data))
    assert torch.equal(layer.running_mean, torch.tensor(mean).bfloat16())
    assert torch.equal(layer.running_var, torch.tensor(var).bfloat16())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("prior", [0, 4, 100.0, math.inf])
def test_the_prior_counts_as_samples(prior: float, exact: bool) -> None:
    """mean = N / (N + n) old + n / (N + n) new, and so the variance, with images for samples; inf keeps the bits, 0
    forgets all."""
    layer = nn.BatchNorm2d(2)
    layer.running_mean.copy_(torch.tensor([3.0, -0.0]))
    layer.running_var.copy_(torch.tensor([0.5, 2.0]))
    old = [value.double().numpy() for value in statistics(layer)[""]]
    bits = [as_bytes(value) for value in statistics(layer)[""]]
    data = torch.randn(12, 2, 4, 4) * 2 - 1
    estimate(layer, data.split(5), prior=prior, exact=exact)
    weight = 0.0 if math.isinf(prior) else 12 / (12 + prior)
    new = oracles.mean_and_unbiased_variance(oracles.channels(data))
    close(layer, *(before * (1 - weight) + after * weight for before, after in zip(old, new, strict=True)))
    if math.isinf(prior):
        assert bits == [as_bytes(value) for value in statistics(layer)[""]]


def test_poisoned_statistics_are_mended() -> None:
    """NaN in the old statistics is not carried over, and the report can still be sorted and written as JSON."""
    model = three()
    model[1].running_var.fill_(math.nan)
    report = estimate(model, [torch.randn(8, 2)])
    assert model[1].running_var.isfinite().all()
    assert str(report).splitlines()[2].startswith("1 ")
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["layers"][1]["log_variance_ratio_rms"] is None


@pytest.mark.parametrize("exact", [False, True])
def test_batches_that_are_not_finite_are_left_out_and_counted(exact: bool) -> None:
    """The statistics are those of the others."""
    data = torch.randn(10, 6, 2)
    poisoned = data.clone()
    poisoned[3, 1, 0], poisoned[7, 2, 1] = math.nan, math.inf
    model = three()
    report = estimate(model, poisoned.unbind(), exact=exact)
    good = data[[k for k in range(10) if k not in (3, 7)]]
    close(model[0], *oracles.mean_and_unbiased_variance(oracles.channels(good.flatten(0, 1))))
    assert (report.batches, report.skipped, {layer.batches for layer in report.layers}) == (10, 2, {8})
    assert "left out: 2 batches" in str(report)


def test_dropout_is_off_and_only_while_it_lasts() -> None:
    """The variance behind dropout p=0.5 is that of inference, half of that in training."""
    data = torch.randn(4000, 2)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2))
    estimate(model, data.split(500))
    close(model[1], *oracles.mean_and_unbiased_variance(oracles.channels(data)))
    assert model[0].training


def test_a_model_that_is_frozen_in_parts_runs_as_at_inference() -> None:
    """A layer that is not chosen normalises with its own statistics, in eval mode."""
    model = three()
    model[0].running_mean.fill_(10.0)
    data = torch.randn(30, 2)
    estimate(model, data.split(7), layers=lambda name, module: name == "1")
    close(model[1], *oracles.mean_and_unbiased_variance(oracles.channels((data - 10) / math.sqrt(1 + 1e-5))), rtol=1e-5)


class Forces(nn.Module):
    """A model whose forward is a derivative of itself, with one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.bn(torch.tanh(self.bn(x)) * 2).square().sum()
        return torch.autograd.grad(energy, x)[0]


@pytest.mark.parametrize("exact", [False, True])
def test_a_forward_that_goes_backward_finds_the_statistics_it_ran_with(exact: bool) -> None:
    """The second call's statistics do not overwrite those that the first call's gradient needs."""
    model = Forces()
    report = estimate(model, torch.randn(4, 8, 3).unbind(), exact=exact)
    assert report.layers[0].samples == 64


class Caching(nn.Module):
    """A model that makes a table when it first runs, and multiplies with it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(1.0, 4.0)
        return self.bn(self.linear(x) * self.table)


@pytest.mark.parametrize("exact", [False, True])
def test_what_a_model_makes_on_the_way_serves_for_training(exact: bool) -> None:
    """Also where the caller is in inference mode, as Lightning is in validation: tensors made there can't be trained
    with."""
    model = Caching()
    with torch.inference_mode():
        estimate(model, torch.randn(4, 8, 3).unbind(), exact=exact)
    model(torch.randn(8, 3)).sum().backward()
    assert model.linear.weight.grad is not None


# --- when to stop
# ---------------------------------------------------------------------------------------------------------------------


def test_the_standard_error_is_that_of_the_batch_means() -> None:
    """rms over channels of sqrt(var of the batch means / k), in standard deviations: the textbook's, for equal
    batches."""
    images = torch.randn(30, 4, 2, 1, 1) + torch.randn(30, 1, 2, 1, 1) * 2
    data = images.expand(30, 4, 2, 3, 3) + 0.1 * torch.randn(30, 4, 2, 3, 3)
    layer = nn.BatchNorm2d(2)
    report = estimate(layer, data.unbind())
    values = data.double()
    error = values.mean((1, 3, 4)).std(0) / math.sqrt(30) / values.movedim(2, 0).flatten(1).std(1, correction=0)
    assert report.layers[0].standard_error == pytest.approx(error.square().mean().sqrt().item(), rel=1e-4)


def test_tolerance_stops_at_the_first_batch_that_meets_it() -> None:
    """Not before 8 batches; the report says after how many, and the figure is below the tolerance there and was not
    before."""
    data = torch.randn(100, 4, 2)
    model = three()
    report = estimate(model, data.unbind(), tolerance=0.07)
    assert report.stopped_by == "tolerance"
    assert 8 < report.batches < 100
    assert max(layer.standard_error for layer in report.layers) < 0.07
    earlier = estimate(three(), data[: report.batches - 1].unbind())
    assert max(layer.standard_error for layer in earlier.layers) >= 0.07
    assert estimate(three(), data.unbind(), tolerance=100.0).batches == 8


def test_a_tolerance_that_is_not_reached_is_told() -> None:
    """The data is used up, and the report says so."""
    report = estimate(three(), torch.randn(9, 4, 2).unbind(), tolerance=1e-9)
    assert (report.stopped_by, report.batches) == ("end", 9)
    assert "tolerance 1e-09 was not reached" in str(report)


def test_tolerance_on_digits_saves_three_quarters_of_the_data() -> None:
    """With batches of 32, tolerance 0.1: within a quarter of the data, mean validation accuracy over 5 seeds within 0.5
    points."""
    batches, differences = [], []
    for seed in range(5):
        torch.manual_seed(seed)
        training, validation = digits(32, seed=seed)
        model = trained(ConvNet(8), training)
        accuracy = []
        for tolerance in (0.1, None):
            with recalibrated(model, training, tolerance=tolerance, progress=False) as report:
                accuracy.append(accuracy_of(model, validation))
            batches.append(report.batches)
        differences.append(accuracy[0] - accuracy[1])
    assert max(batches[::2]) <= len(training) / 4
    assert abs(sum(differences) / 5) < 0.5


def trained(model: nn.Module, training: DataLoader) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for images, labels in training:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy_of(model: nn.Module, validation: DataLoader) -> float:
    model.eval()
    right = torch.cat([(model(images).argmax(1) == labels).float() for images, labels in validation])
    model.train()
    return 100 * right.mean().item()
