"""`drift`: the right z and p, the first layer that deviates, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_bn import DriftReport, convert_batch_norm, drift, keep_spread, recalibrate

Array = NDArray[np.float64]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolution = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    return nn.Sequential(convolution, nn.Linear(64, 6, bias=False), nn.BatchNorm1d(6))


def images(number: int, seed: int = 0, brightness: float = 0.3) -> Tensor:
    """Of a brightness and a contrast of their own each, skewed as photographs are."""
    generator = torch.Generator().manual_seed(seed)
    bright = torch.randn(number, 1, 1, 1, generator=generator).exp() * brightness
    return bright * (1 + torch.randn(number, 1, 6, 6, generator=generator))


@pytest.fixture(scope="module")
def known() -> nn.Sequential:
    model = network()
    recalibrate(model, images(2000).split(250), spread=True, progress=False)
    return model.eval()


def image_moments(model: nn.Sequential, data: Tensor) -> list[Array]:
    """Of both layers, (N, moments and channels), by torch's own layers and float64."""
    found = []
    with torch.no_grad():
        inner = model[0][0](data)
        for layer, x in ((model[0][1], inner), (model[2], model[:2](data))):
            mean, var = layer.running_mean.double(), layer.running_var.double() + layer.eps
            shape = (1, -1, *[1] * (x.dim() - 2))
            x = (x.double() - mean.reshape(shape)) / var.sqrt().reshape(shape)
            over = list(range(2, x.dim()))
            both = (x.mean(over), x.square().mean(over)) if over else (x, x.square())
            found.append(torch.cat(both, 1).numpy())
    return found


def by_simulation(model: nn.Sequential, known: Tensor, live: Tensor, draws: int = 20_000) -> tuple[list[float], float]:
    """z of each layer and p of the network, from draws of numpy's own: each of n known images against the others'
    center."""
    random = np.random.default_rng(0)
    n, total = len(live), len(known)
    rows = np.stack([random.choice(total, n, replace=False) for _ in range(draws)])
    of_live, of_draws = [], []
    for reference, batch in zip(image_moments(model, known), image_moments(model, live), strict=True):
        center, scale = reference.mean(0), reference.std(0, ddof=1)
        standard = (reference - center) / scale
        drawn = sum(standard[rows[:, place]] for place in range(n)) / n
        of_draws.append(np.log((drawn**2).mean(1) / (1 / n - 1 / total)))
        of_live.append(np.log(((((batch.mean(0) - center) / scale) ** 2).mean()) / (1 / n + 1 / total)))
    zs = [(live - drawn.mean()) / drawn.std() for live, drawn in zip(of_live, of_draws, strict=True)]
    worst = np.max([(drawn - drawn.mean()) / drawn.std() for drawn in of_draws], axis=0)
    return zs, float((worst >= max(zs)).mean())


@pytest.mark.parametrize("n", [1, 2, 8, 64])
@pytest.mark.parametrize("brightness", [0.3, 0.42])
def test_z_and_p_are_those_of_a_simulation(known: nn.Sequential, n: int, brightness: float) -> None:
    """Drawn 20,000 times from the known images; p within four standard errors of 2,000 draws."""
    live = images(n, seed=7, brightness=brightness)
    report = drift(known, live)
    zs, p = by_simulation(known, images(2000), live)
    assert [layer.z for layer in report.layers] == pytest.approx(zs, abs=0.15)
    assert report.z == max(layer.z for layer in report.layers)
    assert abs(report.p - p) <= 4 * (max(p, 0.001) / 2000) ** 0.5 + 0.002
    assert report.images == n


def test_what_deviates_first_is_named(known: nn.Sequential) -> None:
    """A change behind the first layer is seen at the second alone; one of the images at the first."""
    bright = drift(known, images(16, seed=3) + 20)
    assert (bright.is_alarm, bright.first, bright.p) == (True, "0.1", pytest.approx(1 / 2001))
    assert bright.layers[0].deviates
    spoiled = network()
    spoiled.load_state_dict(known.state_dict(), strict=False)
    keep_spread(spoiled).load_state_dict(known.state_dict())
    with torch.no_grad():
        spoiled[1].weight.mul_(10)
    report = drift(spoiled, images(16, seed=3))
    assert (report.is_alarm, report.first) == (True, "2")
    assert not report.layers[0].deviates
    clean = drift(known, images(16, seed=3))
    assert (clean.is_alarm, clean.first) == (False, None)


def test_alarm_and_limit_agree(known: nn.Sequential) -> None:
    """z is beyond the limit where p is at most the alarm, for any of them."""
    for seed in range(30):
        for alarm in (0.001, 0.05, 0.5):
            report = drift(known, images(2, seed=seed, brightness=0.5), alarm=alarm)
            assert report.is_alarm == (report.z > report.limit) == (report.first is not None)


def test_the_report_is_plain(known: nn.Sequential) -> None:
    """A headline and a line a layer; JSON; HTML."""
    report = drift(known, images(4, seed=3) + 200)
    lines = str(report).splitlines()
    assert lines[0].startswith("Drift: 4 images, z = ")
    assert "p at most 0.0005 (alarm at 0.01, z > " in lines[0]
    assert lines[0].endswith("First layer that deviates: 0.1.")
    assert [line.split()[0] for line in lines[1:]] == ["layer", "0.1", "2"]
    read = json.loads(json.dumps(report.as_dict()))
    assert (read["images"], read["is_alarm"], read["first"], len(read["layers"])) == (4, True, "0.1", 2)
    assert report._repr_html_().count("<tr") == 3


@pytest.mark.parametrize("convert", [lambda model: model, convert_batch_norm], ids=["torch", "package"])
def test_the_model_stays_as_it_is(convert: Callable[[nn.Module], nn.Module]) -> None:
    """Modes, hooks, statistics and gradients, of a model in training mode too."""
    model = convert(network()).train()
    model[2].eval()
    recalibrate(model, images(200).split(50), spread=True, layers="all", progress=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drift(model, images(4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0][1].training
    assert not model[2].training
    assert not any(module._forward_pre_hooks for module in (model[0][1], model[2]) if type(module) is nn.BatchNorm2d)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_image_that_is_not_finite_is_an_alarm(known: nn.Sequential) -> None:
    live = images(4)
    live[2, 0, 0, 0] = torch.nan
    report = drift(known, live)
    assert report.is_alarm
    assert report.p == pytest.approx(1 / 2001)


def test_a_constant_layer_is_no_alarm_until_it_varies() -> None:
    """Dead channels have no spread to divide by."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2))
    recalibrate(model, torch.ones(500, 2).split(100), spread=True, progress=False)
    assert not drift(model, torch.ones(4, 2)).is_alarm
    assert drift(model, torch.ones(4, 2) * 1.5).is_alarm


def spoiled_statistics(model: nn.Sequential) -> None:
    model.train()(images(8))


def rule_of_other_pass(model: nn.Sequential) -> None:
    recalibrate(model, images(200, seed=1).split(50), spread=True, progress=False, layers="2")


REFUSED: list[tuple[Callable[[nn.Sequential], Any], dict[str, Any], str]] = [
    (lambda model: None, {"alarm": 0.001}, r"alarm=0.001\).*spread of 500 images at least 0.002.*up to 2000"),
    (lambda model: None, {"alarm": 1.5}, "a probability below 1"),
    (spoiled_statistics, {}, r"statistics of 0.1, 2 have moved.*recalibrated statistics.*spread=True\) again"),
    (rule_of_other_pass, {}, "measured in different passes"),
    (lambda model: None, {"forward": lambda model, batch: None}, "no layer with a spread could be judged. 0.1: it did"),
    (lambda model: model.load_state_dict(network().state_dict()), {}, r"none of the 2 batch-norm layers.*spread=True"),
]


@pytest.mark.parametrize(("change", "options", "message"), REFUSED)
def test_what_can_not_be_judged_is_refused(
    change: Callable[[nn.Sequential], Any], options: dict[str, Any], message: str
) -> None:
    """With the call to make instead."""
    model = network()
    recalibrate(model, images(500).split(50), spread=True, progress=False)
    change(model)
    with pytest.raises(ValueError, match=message):
        drift(model, images(4), **options)


def test_a_model_without_room_is_told_to_make_it() -> None:
    with pytest.raises(ValueError, match=r"call keep_spread\(model\) before load_state_dict"):
        drift(network(), images(4))
    with pytest.raises(ValueError, match="has no batch-norm layer that keeps running statistics"):
        drift(nn.Linear(1, 1), images(4))


def test_a_batch_that_does_not_go_in_shows_the_call(known: nn.Sequential) -> None:
    with pytest.raises(TypeError, match=r"Say how it goes in: drift\(model, batch, forward="):
        drift(known, None)


def test_layers_that_are_not_judged_are_named() -> None:
    """One that is called more often than before, and one without a spread."""
    model = network()
    recalibrate(model, images(500).split(50), spread=True, layers="2", progress=False)

    def twice(model: nn.Sequential, batch: Tensor) -> Tensor:
        return model[2](model(batch))

    report: DriftReport = drift(model, images(4))
    assert report.not_judged == ("0.1: it has no spread",)
    with pytest.raises(ValueError, match="2: it was called 2 times for a batch, and 1 times before"):
        drift(model, images(4), forward=twice)
