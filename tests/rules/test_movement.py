"""Statistics moved where they moved: versions and values tell, whatever a layer counts and whoever writes a counter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from found import findings, of, only, serious
from lightning.pytorch.callbacks import BaseFinetuning
from small_data import data
from small_models import Module
from torch import Tensor, nn

from lightning_bn import Averaging, Cumulative, Exponential, Window, check, convert_batch_norm, watch


class WithoutCounter(nn.BatchNorm2d):
    """Writes its buffers in Python and counts no batch, as the synchronised norms of detection toolboxes."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        var, mean = torch.var_mean(input, (0, 2, 3), correction=0)
        with torch.no_grad():
            self.running_mean += 0.1 * (mean - self.running_mean)
            self.running_var += 0.1 * (var - self.running_var)
        return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)


class Kernel(nn.BatchNorm2d):
    """Hands its buffers to torch's kernel, which leaves no version, and counts no batch."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )


class Constant(nn.BatchNorm2d):
    """Normalises with its buffers in either mode."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def network(norm: type[nn.BatchNorm2d]) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


class TrainsInValidation(Module):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.model.train()
        super().validation_step(batch, batch_idx)


class ForwardWithoutGrad(Module):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.model(batch[0] + 1)
        return super().training_step(batch, batch_idx)


class ForwardBetween(Module):
    def on_train_epoch_end(self) -> None:
        with torch.no_grad():
            self.model(torch.randn(8, 1, 6, 6))


class FrozenLayers(Module):
    def configure_optimizers(self) -> Any:
        for parameter in self.model[:2].parameters():
            parameter.requires_grad_(False)
        return torch.optim.SGD(self.model[2:].parameters(), lr=0.1)


MISTAKES = {"BN104": TrainsInValidation, "BN106": ForwardWithoutGrad, "BN107": ForwardBetween, "BN201": FrozenLayers}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, WithoutCounter, Kernel])
@pytest.mark.parametrize("code", MISTAKES)
def test_layers_that_count_nothing_are_watched_like_torchs(code: str, norm: type[nn.BatchNorm2d]) -> None:
    """The same mistake gets the same finding; a forward between batches that leaves neither count nor version is seen
    by nobody."""
    torch.manual_seed(0)
    told = serious(findings(MISTAKES[code](network(norm)), max_epochs=2))
    assert told == ([] if (code, norm) == ("BN107", Kernel) else [code])


@pytest.mark.parametrize("code", MISTAKES)
def test_a_layer_that_never_moves_is_not_said_to_move(code: str) -> None:
    """A forward of its own that reads the buffers in either mode moves nothing, whatever it is asked to do."""
    assert of(code, findings(MISTAKES[code](network(Constant)), max_epochs=2)) == []


@pytest.mark.parametrize("code", ["BN106", "BN201"])
def test_momentum_zero_is_no_movement(code: str) -> None:
    """Only the count rises: the layer is frozen as well as by eval mode."""
    module = MISTAKES[code](network(nn.BatchNorm2d))
    module.model[1].momentum = 0.0
    assert of(code, findings(module)) == []
    assert of("BN201", check(module.requires_grad_(False))) == []


class Teacher(Module):
    """A copy in eval mode whose state, counters and all, is averaged after each batch."""

    through_data = False

    def __init__(self, averaging: Averaging | None) -> None:
        super().__init__(network(nn.BatchNorm2d))
        if averaging is not None:
            convert_batch_norm(self.model, averaging)
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.teacher.eval()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.teacher(batch[0])
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        mine, its = self.model.state_dict(), self.teacher.state_dict()
        for name, value in its.items():
            target = value.data if self.through_data and "running" not in name and "num" not in name else value
            if value.is_floating_point():
                target.lerp_(mine[name], 0.01)
            else:
                target.copy_(mine[name])


@pytest.mark.parametrize("averaging", [None, Window(5), Exponential(0.1), Cumulative()], ids=str)
@pytest.mark.parametrize("through_data", [False, True])
def test_a_copied_state_is_no_forward(averaging: Averaging | None, through_data: bool) -> None:
    """An averaged copy of converted layers takes their counters over, with weights that leave a version or not."""
    module = Teacher(averaging)
    module.through_data = through_data
    assert of("BN107", findings(module)) == []


@pytest.mark.parametrize("averaging", [None, Window(5), Exponential(0.1)], ids=str)
def test_a_forward_between_batches_of_converted_layers(averaging: Averaging | None) -> None:
    """It is still seen, and so is the one of a copy that runs in train mode."""
    module = ForwardBetween(network(nn.BatchNorm2d))
    convert_batch_norm(module, averaging)
    assert only("BN107", findings(module, max_epochs=2)).layers == ("model.1",)


@pytest.mark.parametrize("reset", ["running_mean", "running_var"])
def test_half_a_reset(reset: str) -> None:
    """Only the mean, or only the variance, at its initial value on trained weights is BN204's, and the printed call
    mends it."""
    torch.manual_seed(0)
    module = Module(network(nn.BatchNorm2d))
    findings(module)
    assert check(module.eval()) == []
    getattr(module.model[1], reset).fill_(0.0 if reset == "running_mean" else 1.0)
    found = only("BN204", check(module))
    assert ("mean is 0" in found.seen) == (reset == "running_mean") != ("variance is 1" in found.seen)


class Schedule(BaseFinetuning):
    train_bn = False

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model[:2], train_bn=self.train_bn)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model[:2], optimizer)


def test_the_fix_under_a_schedule_belongs_to_the_schedule() -> None:
    """BN205 names the argument of the schedule's own call, and with it nothing more is said."""
    found = only("BN205", findings(FrozenLayers(network(nn.BatchNorm2d)), Schedule(), max_epochs=2))
    assert found.fix.place == "in the schedule's call of freeze"
    schedule = Schedule()
    schedule.train_bn = eval(f"dict({found.fix.code})")["train_bn"]
    assert serious(findings(Module(network(nn.BatchNorm2d)), schedule, max_epochs=3)) == []


def step_by_hand(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad
            parameter.grad = None


@pytest.mark.parametrize("same_tensor", [False, True])
def test_watch_tells_batches_apart_by_their_backward(same_tensor: bool) -> None:
    """An optimizer that is none of torch's takes the steps: two epochs over the same tensors are no repeated batch."""
    model, batches = network(nn.BatchNorm2d), [batch[0] for batch in data()]
    with watch(model, action="log") as found:
        for _ in range(2):
            for images in batches:
                model(images if same_tensor else images.clone()).sum().backward()
                step_by_hand(model)
    assert [finding.code for finding in found] == []


def test_watch_counts_accumulated_batches_each_by_itself() -> None:
    """Two batches a step of torch's optimizer are two batches."""
    model = network(nn.BatchNorm2d)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, action="log") as found:
        for number, (images, _) in enumerate(data()):
            model(images).sum().backward()
            if number % 2:
                sgd.step()
                sgd.zero_grad()
    assert [finding.code for finding in found] == []


def test_watch_still_sees_a_second_pass_of_one_step() -> None:
    """Sharpness-aware minimisation by a closure of torch's optimizer runs the same input twice a step."""
    model = network(nn.BatchNorm2d)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, action="log") as found:
        for images, _ in data():
            model(images).sum().backward()
            with torch.no_grad():
                model[1].weight.add_(0.01)
            model(images).sum().backward()
            with torch.no_grad():
                model[1].weight.sub_(0.01)
            sgd.step()
            sgd.zero_grad()
    assert [finding.code for finding in found if finding.level != "info"] == ["BN106"]


class WithoutMean(nn.BatchNorm2d):
    """Subtracts no mean, and inherits a buffer for one that it never writes: the norm of networks without biases."""

    def forward(self, input: Tensor) -> Tensor:
        var = self.running_var
        if self.training:
            var = input.var((0, 2, 3))
            with torch.no_grad():
                self.running_var.lerp_(var, self.momentum)
        return input * (self.weight / (var + self.eps).sqrt()).reshape(-1, 1, 1)


class ForgetsMean(WithoutMean):
    """Subtracts the batch's mean in training, and in evaluation a running mean that it never writes."""

    def forward(self, input: Tensor) -> Tensor:
        mean = input.mean((0, 2, 3)) if self.training else self.running_mean
        return super().forward(input - mean.reshape(-1, 1, 1))


@pytest.mark.parametrize(("norm", "off"), [(WithoutMean, False), (ForgetsMean, True)])
def test_a_mean_that_no_evaluation_reads_is_not_off(norm: type[nn.BatchNorm2d], off: bool) -> None:
    """The buffer stays where it began, far from the images' mean; where it is read, that is a gap."""
    torch.manual_seed(0)
    model = network(norm)
    model[0].bias = nn.Parameter(torch.full((4,), 5.0))
    found = findings(Module(model), loader=data(batches=40), max_epochs=2)
    assert [bool(of(code, found)) for code in ("BN208", "BN204")] == [off, False]
