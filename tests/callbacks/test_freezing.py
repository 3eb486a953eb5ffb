"""FreezeBatchNorm: what is frozen stays, bit for bit, and is given back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitting import trainer
from small_data import data
from small_models import Module
from torch import nn

from lightning_bn import FreezeBatchNorm, ModeCheck, StatisticsSets, Window, convert_batch_norm
from lightning_bn.callbacks.both_lightnings import MisconfigurationException
from lightning_bn.discovery import find_batch_norms


def statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.named_buffers() if "running" in name or "num_" in name}


def moved(before: dict[str, torch.Tensor], module: nn.Module) -> set[str]:
    """The parts of the module whose statistics are others."""
    now = statistics(module)
    return {name.split(".")[1] for name, value in before.items() if not torch.equal(value, now[name])}


class Restless(Module):
    """Calls train() wherever programs do, and sets flags directly."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.model.train()
        for layer in find_batch_norms(self.model):
            layer.module.training = True

    def on_validation_end(self) -> None:
        self.train()


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("module", [Module, Restless])
def test_frozen_statistics_are_bit_identical_after_a_fit(module: type[Module], converted: bool) -> None:
    """Whoever calls train(), with validations in between; the other layers' statistics move, the frozen layers' affine
    parameters learn, and all modes are as before."""
    net = module()
    if converted:
        convert_batch_norm(net, Window(3))
    before, modes = statistics(net), {name: part.training for name, part in net.named_modules()}
    weights = {name: value.clone() for name, value in net.named_parameters()}
    trainer(FreezeBatchNorm("model.backbone"), max_epochs=2).fit(net, data(), data(batches=2))
    assert moved(before, net) == {"head"}
    learned = {name for name, value in net.named_parameters() if not torch.equal(value, weights[name])}
    assert {f"{layer.name}.weight" for layer in find_batch_norms(net)} <= learned
    assert {name: part.training for name, part in net.named_modules()} == modes
    assert not any("train" in vars(layer.module) for layer in find_batch_norms(net))


def test_frozen_layers_normalise_with_their_running_statistics() -> None:
    """Unlike those of BaseFinetuning(train_bn=False): the answer to one sample does not depend on the others."""
    net = Module()
    answers: list[bool] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            both, one = (module.model.backbone(batch[0][:size]) for size in (8, 1))
            answers.append(torch.allclose(both[:1], one, atol=1e-5))

    trainer(FreezeBatchNorm(nn.BatchNorm2d), Look(), max_epochs=1).fit(net, data(), data(batches=1))
    assert answers
    assert all(answers)


def test_until_an_epoch() -> None:
    """Frozen in the first epoch, learning in the second, affine parameters too."""
    net = Module()
    seen: list[tuple[set[str], bool]] = []
    before = statistics(net)

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            layer = find_batch_norms(module.model.backbone)[0].module
            seen.append((moved(before, module), layer.weight.requires_grad))

    trainer(FreezeBatchNorm("model.backbone", affine=True, until_epoch=1), Look(), max_epochs=2).fit(
        net, data(), data(batches=1)
    )
    assert seen == [({"head"}, False), ({"head", "backbone"}, True)]


def test_affine_parameters_stay_and_are_given_back() -> None:
    """They are bit-identical after the fit, and require grad again."""
    net = Module()
    layers = find_batch_norms(net.model.backbone)
    before = [parameter.clone() for layer in layers for parameter in layer.module.parameters(recurse=False)]
    trainer(FreezeBatchNorm(["model.backbone.*"], affine=True)).fit(net, data(), data(batches=1))
    after = [parameter for layer in layers for parameter in layer.module.parameters(recurse=False)]
    assert all(map(torch.equal, before, after))
    assert all(parameter.requires_grad for parameter in after)


def test_affine_parameters_of_every_set_stay() -> None:
    """Those of a set that is used in the steps are bit-identical after the fit too, and require grad again."""

    class InTurn(Module):
        def __init__(self) -> None:
            super().__init__()
            self.sets = StatisticsSets(self.model, ["a", "b"], affine=True)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            with self.sets.use("b"):
                other = super().training_step(batch, batch_idx)
            return super().training_step(batch, batch_idx) + other

    net = InTurn()
    before = {name: [each.clone() for each in net.sets.parameters_of(name)] for name in net.sets.names}
    trainer(FreezeBatchNorm("model", affine=True)).fit(net, data(), data(batches=1))
    for name, parameters in before.items():
        assert all(map(torch.equal, parameters, net.sets.parameters_of(name)))
        assert all(parameter.requires_grad for parameter in net.sets.parameters_of(name))


def test_layers_of_configure_model_are_frozen_too() -> None:
    """They are built after setup."""

    class Late(Module):
        def configure_model(self) -> None:
            if not hasattr(self, "late"):
                self.late = nn.BatchNorm2d(1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step([self.late(batch[0]), batch[1]], batch_idx)

    net = Late()
    trainer(FreezeBatchNorm("late")).fit(net, data(), data(batches=1))
    assert net.late.num_batches_tracked == 0


def test_the_guard_knows_of_it() -> None:
    """Layers that are held in eval mode are no mistake of mode."""
    check = ModeCheck(action="raise")
    trainer(check, FreezeBatchNorm("model.backbone"), max_epochs=2).fit(Module(), data(), data(batches=2))
    assert not [finding for finding in check.findings if finding.level != "info"]


def test_a_copy_that_is_made_in_the_fit_is_free() -> None:
    """By copy.deepcopy, as an average of weights makes it, and by pickle."""
    copies: list[nn.Module] = []

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            copies[:] = [copy.deepcopy(module.model), pickle.loads(pickle.dumps(module.model))]

    trainer(FreezeBatchNorm("model"), Copy()).fit(Module(), data(), data(batches=1))
    for each in copies:
        layer = find_batch_norms(each.train())[0].module
        layer(torch.randn(4, layer.num_features, 3, 3))
        assert layer.training
        assert layer.num_batches_tracked == 1


def test_given_back_after_an_exception() -> None:
    """The layer is its own again."""

    class Fails(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("mistake")

    net = Fails()
    with pytest.raises(KeyError):
        trainer(FreezeBatchNorm("model.backbone")).fit(net, data(), data(batches=1))
    assert all(layer.module.training and "train" not in vars(layer.module) for layer in find_batch_norms(net))


@pytest.mark.parametrize(
    ("arguments", "error", "shown"),
    [
        ({"modules": 3}, TypeError, r"FreezeBatchNorm\(3\)"),
        ({"modules": "model", "until_epoch": 0}, ValueError, "until_epoch=0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], shown: str) -> None:
    """Told at once, with the call."""
    with pytest.raises(error, match=shown):
        FreezeBatchNorm(**arguments)


def test_no_batch_norm_is_meant() -> None:
    """The error names those that there are."""
    with pytest.raises(MisconfigurationException, match=r"FreezeBatchNorm\('backbone'\).*model\.backbone\.1"):
        trainer(FreezeBatchNorm("backbone")).fit(Module(), data(), data(batches=1))
