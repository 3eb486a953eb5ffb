"""Published self-supervised recipes, re-created small: with the callback and without it they end with the same weights,
to the bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fitting import fit
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities import CombinedLoader
from small_data import loader, training_data
from small_models import Small
from states import matches_weights
from torch import Tensor, nn

from lightning_bn import BatchNormRecalibration


def encoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


class SelfSupervised(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = encoder(), encoder().requires_grad_(False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    @torch.no_grad()
    def follow(self) -> None:
        for one, other in zip(self.online.parameters(), self.target.parameters(), strict=True):
            other.data = other.data * 0.9 + one.data * 0.1


class AveragedTeacher(SelfSupervised):
    """The teacher is an average of the student's weights, moved in the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.follow()
        return F.mse_loss(self.online(batch[0]), self.target(batch[0] + 0.1))


class Prototypes(SelfSupervised):
    """Prototypes are normalised in place before each use."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Linear(3, 5, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight))
        return self.prototypes(self.online(batch[0])).logsumexp(1).mean()


class MomentumQueue(SelfSupervised):
    """A momentum encoder fills a queue, whose place is a plain number; the batch is augmented in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.randn(16, 3))
        self.place, self.history = 0, {"losses": []}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch[0].add_(0.01)
        for one, other in zip(self.online.parameters(), self.target.parameters(), strict=True):
            other.data.mul_(0.9).add_(one.data, alpha=0.1)
        keys = self.target(batch[0]).detach()
        loss = (self.online(batch[0]) @ self.queue.clone().T).logsumexp(1).mean()
        self.queue[self.place : self.place + 8] = keys
        self.place = (self.place + 8) % 16
        self.history["losses"].append(float(loss.detach()))
        self.optimizers().param_groups[0]["lr"] *= 0.99
        return loss


@pytest.mark.parametrize("when", ["fit_end", "validation"])
@pytest.mark.parametrize("recipe", [AveragedTeacher, Prototypes, MomentumQueue])
def test_the_weights_are_as_without_the_callback(recipe: type[SelfSupervised], when: str) -> None:
    """Parameters, buffers that are no statistics, attributes and the optimizer."""
    modules, runners = [], []
    for callbacks in ([], [BatchNormRecalibration(when=when)]):
        torch.manual_seed(0)
        module = recipe()
        module.validation_step = lambda batch, batch_idx: None
        module, runner = fit(*callbacks, module=module)
        modules.append(module)
        runners.append(runner)
    one, other = modules
    states = [
        {name: value for name, value in module.state_dict().items() if "running" not in name} for module in modules
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(one.online[1].running_mean, other.online[1].running_mean)
    assert vars(one).get("place") == vars(other).get("place")
    assert vars(one).get("history") == vars(other).get("history")
    groups = [runner.optimizers[0].param_groups[0]["lr"] for runner in runners]
    assert groups[0] == groups[1]


def test_finetuning_that_freezes_batch_norm_does_not_end_the_fit() -> None:
    """Layers that do not track for now are left alone, and those unfrozen later are recalibrated."""

    class Finetuning(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze([pl_module.bn1, pl_module.rest], train_bn=False)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group([pl_module.bn1], optimizer)

    class Filtered(Small):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    callback = BatchNormRecalibration()
    module, _ = fit(Finetuning(), callback, module=Filtered(), val=None)
    assert [layer.name for layer in callback.report.layers] == ["bn1"]
    assert matches_weights(module.state_dict())


def test_a_layer_that_is_replaced_in_the_fit_is_recalibrated() -> None:
    """The new object under the old name, after the last look at the layers."""

    class Replacing(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 9:
                pl_module.bn1 = nn.BatchNorm1d(5)

    module, _ = fit(Replacing(), BatchNormRecalibration(), val=None)
    assert matches_weights(module.state_dict())


def test_layers_in_eval_by_mistake_are_not_called_frozen() -> None:
    """They could learn, and the warning says what to call."""

    class Eval(Small):
        def on_train_batch_start(self, *_: Any) -> None:
            self.eval()

    with pytest.warns(UserWarning, match=r"bn1, rest\.3 can learn, but .* call module\.train\(\)") as caught:
        fit(BatchNormRecalibration(), module=Eval(), val=None)
    assert not any("is frozen" in str(each.message) for each in caught)


def test_a_combined_loader_may_be_given() -> None:
    """It has a __next__, and is no iterator that is used up."""

    class Two(Small):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(batch["a"][0] if isinstance(batch, dict) else batch)

    callback = BatchNormRecalibration(dataloader=CombinedLoader({"a": loader(), "b": loader(16)}, "min_size"))
    fit(callback, module=Two(), val=None)
    assert callback.report.batches == len(training_data()) // 16


def test_the_callback_pickles_after_a_fit() -> None:
    """With its report, and without what it knows of the fit."""
    callback = BatchNormRecalibration()
    fit(callback, val=None)
    again = pickle.loads(pickle.dumps(callback))
    assert str(again.report) == str(callback.report)
    assert copy.deepcopy(callback).when == "fit_end"
