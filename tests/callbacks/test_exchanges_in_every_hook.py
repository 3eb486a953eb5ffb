"""Weights exchanged in every hook that a module or a callback has: at each evaluated batch, and when the fit ends, the
statistics are those of the weights, or the callback has said why not."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitting import trainer
from lightning.pytorch.core import hooks
from small_data import loader, training_data
from small_models import Small
from torch.utils.data import DataLoader

from lightning_bn import BatchNormRecalibration
from lightning_bn.modes import is_extra_pass

STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")
CALLED = (
    *STEPS, "configure_optimizers", "configure_callbacks", "configure_gradient_clipping", "optimizer_step",
    "optimizer_zero_grad", "backward", "state_dict", "zero_grad",
)  # fmt: skip
BASES = hooks.ModelHooks, hooks.DataHooks, hooks.CheckpointHooks
HOOKS = {
    "module": sorted({name for each in BASES for name in vars(each) if name[0] != "_"} | set(CALLED)),
    "callback": sorted(name for name in vars(pl.Callback) if name[0] != "_" and name != "state_key"),
}
NOT_CALLED = {
    *(f"on_{stage}_model_train" for stage in ("validation", "test", "predict")),
    *(f"{stage}_dataloader" for stage in ("train", "val", "test", "predict")),
    "configure_model", "configure_sharded_model", "prepare_data", "state_dict", "load_state_dict", "on_exception",
    "on_load_checkpoint", "on_save_checkpoint", "on_sanity_check_start", "on_sanity_check_end",
}  # fmt: skip
WHO = {"module": "module", "callback before": "callback", "callback behind": "callback"}


class Watched(Small):
    """Keeps how far the first layer's statistics are off in each evaluated batch."""

    def __init__(self) -> None:
        super().__init__()
        self.off: list[float] = []
        self.evaluates = False

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.evaluates:
            self.off.append(self.distance())
        return super().forward(inputs)

    def evaluation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluates = True
        self(batch[0])
        self.evaluates = False

    validation_step = test_step = predict_step = evaluation_step

    def exchange(self) -> None:
        self.first.weight.data.mul_(1.5)  # through .data, which moves no version

    def distance(self) -> float:
        """A float64 oracle: how far mean and deviation are from those of all training data, in its deviations."""
        with torch.no_grad():
            inputs = training_data().tensors[0].double() @ self.first.weight.double().T + self.first.bias.double()
        mean, std = inputs.mean(0), inputs.std(0)
        means = (self.bn1.running_mean.double() - mean) / std
        return float(torch.maximum(means.abs(), (self.bn1.running_var.double().sqrt() / std - 1).abs()).max())


def wrap(owner: Any, name: str, module: Watched, at: int, seen: Counter[str]) -> None:
    """Have the hook exchange the weights in its call number `at`, and count its calls; those that a recalibration makes
    as it runs training batches are no part of the fit, and what they write is undone."""
    own = getattr(owner, name)

    @functools.wraps(own)
    def exchanging(*arguments: Any, **options: Any) -> Any:
        if not is_extra_pass():
            seen[name] += 1
            if seen[name] == at:
                module.exchange()
        return own(*arguments, **options)

    setattr(owner, name, exchanging)


@functools.cache
def fitted() -> tuple[Watched, BatchNormRecalibration]:
    torch.manual_seed(0)
    module, repair = Watched(), BatchNormRecalibration(when="validation", num_batches=None)
    trainer(repair, num_sanity_val_steps=0).fit(module, loader(16), DataLoader(training_data(), 24))
    return module, repair


def run(who: str, at: dict[str, int], stage: str, *, fresh: bool = False) -> tuple[Watched, list[str], Counter[str]]:
    """Fit, or evaluate behind a fit, with exchanges in the hooks `at`; return what the package warned of, and how often
    each hook was called.

    Args:
        fresh: evaluate with a callback that was not in the fit.
    """
    if stage == "fit":
        torch.manual_seed(0)
        module, repair = Watched(), BatchNormRecalibration(when="validation", num_batches=None)
    else:
        module, repair = copy.deepcopy(fitted())
        module.off.clear()
    repair = BatchNormRecalibration() if fresh else repair
    other, seen = pl.Callback(), Counter[str]()
    for name, number in at.items():
        wrap(module if who == "module" else other, name, module, number, seen)
    callbacks = [other, repair] if who == "callback before" else [repair, other]
    data = [DataLoader(training_data(), 24)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        getattr(trainer(*callbacks, num_sanity_val_steps=0), stage)(module, *[loader(16)] * (stage == "fit"), *data)
    return module, [str(each.message) for each in said if "BatchNormRecalibration" in str(each.message)], seen


@functools.cache
def calls(who: str, stage: str) -> Counter[str]:
    """How often each hook is called."""
    module, said, seen = run(who, dict.fromkeys(HOOKS[WHO[who]], -1), stage)
    assert said == []
    assert max(module.off) < 1e-5
    return seen


def silent(who: str, stage: str, *, fresh: bool = False) -> set[str]:
    """Return the hooks in which an exchange, in their first call or their last, leaves other statistics than those of
    the weights, and nothing is said."""
    found = set()
    for name, number in calls(who, stage).items():
        for at in {1, number}:
            module, said, _ = run(who, {name: at}, stage, fresh=fresh)
            worst = max([*module.off, module.distance()] if stage == "fit" else module.off)
            if worst > 1e-5 and not said:
                found.add(name)
    return found


@pytest.mark.parametrize("who", WHO)
def test_in_a_fit(who: str) -> None:
    """Nothing comes behind the module's own `teardown` and that of a later callback."""
    assert silent(who, "fit") == (set() if who == "callback before" else {"teardown"})


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("who", WHO)
def test_in_a_test(who: str, fresh: bool) -> None:
    """Also with a callback that was in no fit: it knows the weights since its `setup`."""
    assert silent(who, "test", fresh=fresh) <= ({"setup", "configure_callbacks"} if fresh else set())


@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_in_a_validation_and_a_prediction(stage: str) -> None:
    """As in a test."""
    assert silent("module", stage) == set()


def test_every_hook_was_called() -> None:
    """But those of saving, loading, sharding, sanity checks, errors, and of the loaders that a module makes."""
    rest = {kind: set(names) for kind, names in HOOKS.items()}
    for who, kind in WHO.items():
        for stage in ("fit", "test", "validate", "predict"):
            rest[kind] -= calls(who, stage).keys()
    assert rest["module"] | rest["callback"] <= NOT_CALLED
