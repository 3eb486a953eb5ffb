"""Whether statistics fit, judged in loops of one's own: the same mistakes as in a Trainer, and the same silence."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from small_data import data
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lightning_bn import Finding, recalibrate, watch


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip


class Loop:
    """Trains on images with a mean of five deviations, and evaluates behind the epoch."""

    def __init__(self, model: nn.Module | None = None, batches: int = 40) -> None:
        torch.manual_seed(0)
        self.model = model or network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.batches = [(images + 5, labels) for images, labels in data(batches=batches)]
        self.evaluated: list[Tensor] = []

    def train(self) -> None:
        self.model.train()
        for images, labels in self.batches:
            self.optimizer.zero_grad()
            self.step(images, labels)
            self.optimizer.step()

    def step(self, images: Tensor, labels: Tensor) -> None:
        F.cross_entropy(self.model(images), labels).backward()

    @torch.no_grad()
    def evaluate(self, images: Tensor | None = None) -> None:
        self.model.eval()
        self.evaluated.append(self.model(self.batches[0][0] if images is None else images))

    @torch.no_grad()
    def multiply(self, factor: float) -> None:
        for parameter in self.model.parameters():
            parameter.mul_(factor)


def watched(loop: Loop, run: Callable[[Loop], None]) -> list[Finding]:
    with watch(loop.model, action="log") as findings:
        run(loop)
    return [each for each in findings if each.code == "BN208"]


def exchanging(loop: Loop) -> None:
    loop.train()
    loop.multiply(3.0)
    loop.evaluate()


def test_weights_exchanged_for_an_evaluation() -> None:
    """The first layer that is off is named, with the measurement on the training images and a fix for a loop that,
    applied, brings silence."""
    (found,) = watched(Loop(), exchanging)
    assert (found.stage, found.layers[0]) == ("evaluation", "1")
    assert "normalises even the training images" in found.seen
    assert "of answers change" in found.seen
    assert found.fix.code == "recalibrate(model, batches)"

    def mended(loop: Loop) -> None:
        loop.train()
        loop.multiply(3.0)
        recalibrate(loop.model, [images for images, _ in loop.batches], progress=False)
        loop.evaluate()

    assert watched(Loop(), mended) == []


def test_under_fabric() -> None:
    """The model that `fabric.setup` returned is unwrapped for the replay: what holds all norms takes no images."""
    torch.manual_seed(0)
    first, *layers = network()
    loop = Loop(nn.Sequential(first, nn.Sequential(*layers[:5]), *layers[5:]))
    loop.model, loop.optimizer = Fabric(accelerator="cpu", devices=1).setup(loop.model, loop.optimizer)
    (found,) = watched(loop, exchanging)
    assert "of answers change" in found.seen


def test_an_honest_loop() -> None:
    """Several epochs, each evaluated."""

    def run(loop: Loop) -> None:
        for _ in range(3):
            loop.train()
            loop.evaluate()

    assert watched(Loop(), run) == []


@pytest.mark.parametrize(("batches", "judged"), [(29, False), (30, True)])
def test_few_batches_are_not_judged(batches: int, judged: bool) -> None:
    """As in a Trainer."""
    assert bool(watched(Loop(batches=batches), exchanging)) is judged


def test_an_evaluation_alone() -> None:
    """Without a training batch it is information, by the evaluation's own images."""
    loop = Loop()
    loop.train()
    (found,) = watched(loop, lambda loop: loop.evaluate(loop.batches[0][0] * 4))
    assert found.level == "info"
    assert "no training batch was run" in found.seen


def test_data_of_another_kind() -> None:
    """Where only the evaluation's images are off, it is information."""

    def run(loop: Loop) -> None:
        loop.train()
        loop.evaluate(loop.batches[0][0] * 4)

    (found,) = watched(Loop(), run)
    assert found.level == "info"
    assert "its data differ" in found.seen


class PseudoLabels(Loop):
    def step(self, images: Tensor, labels: Tensor) -> None:
        self.evaluate(images * 4)
        self.model.train()
        super().step(images, labels)


def test_a_call_in_each_step_is_no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pseudo-labels nothing is measured but once, before the first step."""
    judged = []
    monkeypatch.setattr("lightning_bn.rules.fit_test.FitTest._judge", lambda self, where: judged.append(where))
    watched(PseudoLabels(), Loop.train)
    assert len(judged) == 1


def test_the_replay_leaves_nothing_behind() -> None:
    """Weights, statistics and what is evaluated are those of the loop without `watch`."""
    plain, other = Loop(), Loop()
    exchanging(plain)
    assert watched(other, exchanging)
    assert torch.equal(plain.evaluated[0], other.evaluated[0])
    state = other.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.model.state_dict().items())
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in other.model.modules())


def test_a_forward_that_raises() -> None:
    """An evaluation whose first call fails is not judged, and the next one is."""

    def run(loop: Loop) -> None:
        loop.train()
        with pytest.raises(RuntimeError):
            loop.evaluate(torch.zeros(2, 3, 1, 1))
        loop.train()
        loop.multiply(3.0)
        loop.evaluate()

    assert len(watched(Loop(), run)) == 1


def test_a_copy_of_a_watched_model_is_not_watched() -> None:
    """An averaged copy that is evaluated beside the model is no evaluation of it, which is judged when it comes."""

    def run(loop: Loop) -> None:
        loop.train()
        other = copy.deepcopy(loop.model).eval()
        with torch.no_grad():
            other(loop.batches[0][0] * 4)
        found.extend(each for each in findings if each.code == "BN208")
        loop.multiply(3.0)
        loop.evaluate()

    loop, found = Loop(), []
    with watch(loop.model, action="log") as findings:
        run(loop)
    assert found == []
    assert [each.level for each in findings if each.code == "BN208"] == ["error"]


class Breaks(nn.Module):
    """Raises in eval mode."""

    def forward(self, features: Tensor) -> Tensor:
        if not self.training:
            raise ZeroDivisionError
        return features


def test_an_evaluation_that_raises_behind_a_layer() -> None:
    """What was measured until then is not judged in the training that goes on, and no hook stays."""

    def run(loop: Loop) -> None:
        loop.train()
        with pytest.raises(ZeroDivisionError):
            loop.evaluate(loop.batches[0][0] * 4)
        loop.train()
        hooks.append(len(torch_module._global_forward_pre_hooks))

    hooks = [len(torch_module._global_forward_pre_hooks)]
    assert watched(Loop(nn.Sequential(*network()[:6], Breaks(), *network()[6:])), run) == []
    assert hooks[0] == hooks[1]


class EvaluatesBetween(Loop):
    """Evaluates once between a forward and its backward."""

    def step(self, images: Tensor, labels: Tensor) -> None:
        answers = self.model(images)
        if images is self.batches[35][0]:
            self.evaluate(images * 4)
            self.model.train()
        F.cross_entropy(answers, labels).backward()


def test_a_backward_that_waits() -> None:
    """The replay writes nothing that autograd has kept."""
    (found,) = watched(EvaluatesBetween(), Loop.train)
    assert found.level == "info"
