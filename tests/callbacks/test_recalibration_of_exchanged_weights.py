"""Statistics of the weights that are evaluated, in whichever hook of a module or a callback those are put in."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitting import trainer
from small_data import loader, training_data
from small_models import Small
from torch.utils.data import DataLoader

from lightning_bn import BatchNormRecalibration, recalibrate
from lightning_bn.callbacks.evaluated_weights import EvaluatedWeights
from lightning_bn.ranks.collective import Ranks


class Shadow:
    """An average of the parameters, as people write it: through ``.data``, which moves no version."""

    def __init__(self, module: pl.LightningModule) -> None:
        self.values = [parameter.detach().clone() for parameter in module.parameters()]

    def update(self, module: pl.LightningModule) -> None:
        for value, parameter in zip(self.values, module.parameters(), strict=True):
            value.lerp_(parameter.detach(), 0.2)

    def swap(self, module: pl.LightningModule) -> None:
        for value, parameter in zip(self.values, module.parameters(), strict=True):
            mine = parameter.detach().clone()
            parameter.data.copy_(value)
            value.copy_(mine)


def off(module: Small) -> float:
    """How far the first layer's running mean is from that of all training data, in deviations: a float64 oracle."""
    with torch.no_grad():
        inputs = torch.nn.functional.linear(
            training_data().tensors[0].double(), module.first.weight.double(), module.first.bias.double()
        )
    mean, std = inputs.mean(0), inputs.std(0)
    return float(((module.bn1.running_mean.double() - mean) / std).abs().max())


class Exchanging(Small):
    """Puts the average in, in the hook `place`, and takes it out again in `back`."""

    def __init__(self, place: str, back: str | None) -> None:
        super().__init__()
        self.shadow = Shadow(self)
        self.off: list[float] = []
        for name in (place, back):
            if name is not None:
                setattr(self, name, self._after_a_swap(getattr(self, name)))

    def _after_a_swap(self, own: Callable[..., None]) -> Callable[..., None]:
        def swapped(*args: Any) -> None:
            self.shadow.swap(self)
            own(*args)

        return swapped

    def on_train_batch_end(self, *_: Any) -> None:
        self.shadow.update(self)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.off.append(off(self))


class ExchangingCallback(pl.Callback):
    def __init__(self, module: Exchanging, place: str, back: str | None) -> None:
        for name in (place, back):
            if name is not None:
                setattr(self, name, lambda *_: module.shadow.swap(module))


def fit(module: Exchanging, *callbacks: pl.Callback) -> Exchanging:
    data = DataLoader(training_data(), 24)
    trainer(*callbacks, max_epochs=2, num_sanity_val_steps=0).fit(module, loader(), data)
    return module


IN_VALIDATION = [
    ("on_validation_start", "on_validation_end"),
    ("on_validation_epoch_start", "on_validation_epoch_end"),
]


@pytest.mark.parametrize("who", ["module", "callback before", "callback behind"])
@pytest.mark.parametrize("places", IN_VALIDATION, ids=lambda places: places[0])
def test_exchanged_for_validation(who: str, places: tuple[str, str]) -> None:
    """Whoever exchanges them and in whichever hook, the first validation and the second read statistics of what they
    evaluate."""
    torch.manual_seed(0)
    repair = BatchNormRecalibration(when="validation", num_batches=None)
    if who == "module":
        module = fit(Exchanging(*places), repair)
    else:
        module = Exchanging("on_fit_start", "on_fit_start")  # twice: nothing
        callback = ExchangingCallback(module, *places)
        fit(module, *([callback, repair] if who.endswith("before") else [repair, callback]))
    assert len(module.off) == 4
    assert max(module.off) < 1e-5


@pytest.mark.parametrize("who", ["module", "callback behind"])
@pytest.mark.parametrize("place", ["on_train_end", "on_fit_end"])
def test_exchanged_at_the_end(who: str, place: str) -> None:
    """The weights that the fit leaves have statistics of their own."""
    torch.manual_seed(0)
    repair = BatchNormRecalibration(num_batches=None)
    if who == "module":
        module = fit(Exchanging(place, None), repair)
    else:
        module = Exchanging("on_fit_start", "on_fit_start")
        fit(module, repair, ExchangingCallback(module, place, None))
    assert off(module) < 1e-5


@pytest.mark.parametrize(
    "places",
    [("on_validation_batch_start", "on_validation_batch_end"), ("validation_step", None)],
    ids=lambda it: it[0],
)
def test_exchanged_around_a_batch(places: tuple[str, str | None]) -> None:
    """No statistics can be recalibrated in time, and that is said once, with the hook that works."""
    torch.manual_seed(0)
    repair = BatchNormRecalibration(when="validation", num_batches=None)
    with pytest.warns(UserWarning, match=r"on_validation_batch_start or inside.*on_validation_epoch_start"):
        fit(Exchanging(*places), repair)


def test_weights_that_stay_are_recalibrated_once() -> None:
    """A pass costs what it costs, and is made once a validation, and once when a fit ends."""
    torch.manual_seed(0)
    callbacks = [BatchNormRecalibration(when="validation"), BatchNormRecalibration()]
    fit(Exchanging("on_fit_start", "on_fit_start"), *callbacks)
    assert [each.state_dict()["count"] for each in callbacks] == [2, 1]


@pytest.mark.parametrize("place", ["on_test_start", "on_test_model_eval", "test_step", "on_predict_start"])
def test_exchanged_in_a_test_or_prediction(place: str) -> None:
    """Nothing is recalibrated there, and that is said, with the call that does it."""
    torch.manual_seed(0)
    module = fit(Exchanging("on_fit_start", "on_fit_start"), repair := BatchNormRecalibration())
    own = getattr(module, place)

    def swapped(*args: Any) -> None:
        module.shadow.swap(module)
        own(*args)

    setattr(module, place, swapped)
    stage = "predict" if "predict" in place else "test"
    with pytest.warns(UserWarning, match=rf"trainer\.{stage} evaluates other weights.*recalibrate\(self, batches\)"):
        getattr(trainer(repair), stage)(module, DataLoader(training_data(), 24))


@pytest.mark.parametrize("exchanged", [False, True])
def test_a_test_of_a_file(exchanged: bool, tmp_path: Path) -> None:
    """What a file holds belongs together: an exchange behind its loading is reported, and without one nothing is said;
    no hook stays on the module, also where no batch was evaluated."""

    class Behind(Small):
        def on_test_start(self) -> None:
            self.first.weight.data.mul_(1.5 if exchanged else 1.0)

    fit(Small()).trainer.save_checkpoint(path := tmp_path / "fit.ckpt")
    module, repair = Behind(), BatchNormRecalibration()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for batches in (0, 1.0):
            trainer(repair, limit_test_batches=batches).test(module, DataLoader(training_data(), 24), ckpt_path=path)
            assert not module._load_state_dict_post_hooks
    assert sum("trainer.test evaluates other weights" in str(each.message) for each in said) == exchanged


def test_weights_loaded_by_a_hook() -> None:
    """They are an exchange where no file was asked for."""

    class Loads(Small):
        def on_test_model_eval(self) -> None:
            super().on_test_model_eval()
            self.load_state_dict(
                {name: value * (1.5 if "first" in name else 1) for name, value in self.state_dict().items()}
            )

    with pytest.warns(UserWarning, match=r"trainer\.test evaluates other weights"):
        trainer(BatchNormRecalibration()).test(fit(Loads()), DataLoader(training_data(), 24))


def test_another_order_of_adding_is_no_exchange() -> None:
    """On another number of threads sums differ in their last digits."""
    module, weights = torch.nn.Linear(1000, 300), EvaluatedWeights()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        weights.remember(module)
        torch.set_num_threads(3)
        assert not weights.are_others(module, Ranks())
    finally:
        torch.set_num_threads(threads)
    module.weight.data[7, 7] += 1e-3
    assert weights.are_others(module, Ranks())


@pytest.mark.parametrize("mended", [False, True])
def test_weights_that_belong_to_their_statistics(mended: bool) -> None:
    """Nothing is said of a test of what the fit left, nor of an exchange behind which the statistics are
    recalibrated."""

    class Mended(Exchanging):
        def on_test_start(self) -> None:
            if mended:
                self.shadow.swap(self)
                recalibrate(self, [training_data().tensors[0]], progress=False)

    torch.manual_seed(0)
    module = fit(Mended("on_fit_start", "on_fit_start"), repair := BatchNormRecalibration())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "BatchNormRecalibration")
        trainer(repair).test(module, DataLoader(training_data(), 24))


def test_weights_that_the_first_forward_makes() -> None:
    """They are not there when a test begins, and nothing is said of them."""
    module = Small()
    module.first, module.bn1 = torch.nn.LazyLinear(5), torch.nn.LazyBatchNorm1d()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*BatchNormRecalibration")
        trainer(BatchNormRecalibration()).test(module, DataLoader(training_data(), 24))


@pytest.mark.parametrize("places", [*IN_VALIDATION, ("on_train_end", None), ("on_fit_end", None)])
def test_a_recalibration_for_validations_leaves_its_own_statistics(places: tuple[str, str | None]) -> None:
    """Also where averaged weights are validated and others are left, or others are put in when the training is over."""
    torch.manual_seed(0)
    module = fit(Exchanging(*places), BatchNormRecalibration(when="validation", num_batches=None))
    assert off(module) < 1e-5


@pytest.mark.parametrize("moved_here", [False, True])
def test_every_rank_is_asked_whatever_it_found_itself(moved_here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose forward ran with other weights meets the others too, who would wait for it."""
    asked: list[bool] = []

    def share(ranks: Ranks, decision: bool) -> list[bool]:
        asked.append(decision)
        return [False, False]

    monkeypatch.setattr(Ranks, "share", share)
    module, weights = Small(), EvaluatedWeights()
    weights.remember(module)
    if moved_here:
        with torch.no_grad():
            module.first.weight.add_(1)
    weights.look(module, "first")
    module.eval()(torch.randn(4, 4))
    weights.tell_of_others(pl.Trainer(logger=False, enable_checkpointing=False), module, Ranks())
    assert asked == [moved_here]
