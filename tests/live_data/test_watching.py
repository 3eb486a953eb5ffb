"""`watch_drift` around a serving loop."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_bn import drift, recalibrate, watch_drift


def served() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    recalibrate(model, images(1000).split(100), spread=True, progress=False)
    return model.eval()


def images(number: int) -> Tensor:
    return torch.rand(number, 1, 6, 6)


def test_each_forward_is_judged_as_drift_does() -> None:
    """The same report for the same images, and the same answers of the model; counts add up."""
    model = served()
    batches = [images(4), images(1) + 0.5, images(7)]
    expected = [drift(model, batch) for batch in batches]
    answers = [model(batch) for batch in batches]
    with warnings.catch_warnings(), watch_drift(model) as watch:
        warnings.simplefilter("ignore")
        for batch, report, answer in zip(batches, expected, answers, strict=True):
            assert torch.equal(model(batch), answer)
            assert watch.last == report
    assert (watch.batches, watch.images, watch.alarms) == (3, 12, 1)
    assert watch.first == expected[1]
    assert watch.largest_z == max(report.z for report in expected)
    assert str(watch) == ("1 of 3 batches (12 images) gave an alarm, 0.03 are expected of clean data; the first at 1.")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_the_first_alarm_is_said_once() -> None:
    """With the table, and what to do."""
    model = served()
    with warnings.catch_warnings(record=True) as caught, watch_drift(model) as watch:
        warnings.simplefilter("always")
        for _ in range(5):
            model(images(4) + 1)
    assert watch.alarms == 5
    (said,) = [str(each.message) for each in caught]
    assert said.startswith("Drift: 4 images")
    assert "recalibrate(model, batches, spread=True, prior=float('inf'))" in said


def test_training_mode_is_not_judged_and_counted() -> None:
    """Its statistics move: the next forward in eval mode says that they have."""
    model = served()
    with watch_drift(model) as watch:
        model.train()(images(8))
        assert (watch.batches, watch.not_judged) == (0, 1)
        assert "1 forwards in training mode not judged" in str(watch)
        with pytest.raises(ValueError, match="statistics of 1 have moved"):
            model.eval()(images(8))


def test_a_pass_of_the_packages_own_is_not_counted() -> None:
    model = served()
    with watch_drift(model) as watch:
        drift(model, images(4))
        model(images(4))
    assert watch.batches == 1


def test_no_hook_is_left_after_an_exception() -> None:
    model = served()
    with pytest.raises(RuntimeError), watch_drift(model):
        model(torch.zeros(1))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"watch_drift\(model\): none of the 1"), watch_drift(nn.BatchNorm1d(1)):
        pass


def test_the_host_waits_once_a_forward() -> None:
    """One read of the device's numbers, however many layers there are."""
    layers = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(6)]
    model = nn.Sequential(*layers)
    recalibrate(model, torch.randn(200, 4).split(50), spread=True, progress=False)
    model.eval()
    with watch_drift(model, alarm=0.05), torch.no_grad():
        model(torch.randn(4, 4))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(torch.randn(4, 4))
    calls = {each.key: each.count for each in profile.key_averages()}
    # `tolist` of a CPU tensor asks for none; `item`, `bool` and `int` of a tensor are this.
    assert calls.get("aten::_local_scalar_dense", 0) == 0
