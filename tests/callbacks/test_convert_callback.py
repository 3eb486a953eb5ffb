"""ConvertBatchNorm in real fits: when it converts, what it leaves alone, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitting import fit, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from small_data import loader
from small_models import Small
from states import parameters_equal
from torch import Tensor, nn

from lightning_bn import Averaging, BatchNorm1d, ConvertBatchNorm, Cumulative, Exponential, Window
from lightning_bn.discovery import find_batch_norms

# A resumed run writes where the first has written.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class Built(Small):
    """The same layers, built where large models build theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.Identity()

    def configure_model(self) -> None:
        if isinstance(self.bn1, nn.Identity):
            self.bn1 = nn.BatchNorm1d(5)


def averages(module: nn.Module) -> list[str]:
    return [repr(getattr(layer.module, "averaging", None)) for layer in find_batch_norms(module)]


def histories(module: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in module.state_dict().items() if ".averaging." in key}


class Seen(pl.Callback):
    """Notes what the layers are when an optimizer exists for the first time."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.averages = averages(pl_module)
        self.histories = {key: value.clone() for key, value in histories(pl_module).items()}


class AsOptimizerIsBuilt(Small):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.seen = averages(self)
        return super().configure_optimizers()


def test_converts_before_the_optimizer_is_built_and_changes_no_weight() -> None:
    """An unmodified model has its windows when its optimizer is built, and its weights end as without the callback, to
    the bit."""
    module = AsOptimizerIsBuilt()
    torch.manual_seed(0)
    module.load_state_dict(Small().state_dict())
    module, _ = fit(ConvertBatchNorm(Window(3)), module=module)
    plain, _ = fit()
    assert module.seen == ["Window(size=3)"] * 2
    assert isinstance(module.bn1, BatchNorm1d)
    assert parameters_equal(module, plain)
    assert not torch.equal(module.bn1.running_mean, plain.bn1.running_mean)


@pytest.mark.parametrize("kind", [Small, Built])
def test_resumed_fit_goes_on_with_the_history(kind: type[Small], tmp_path: Path) -> None:
    """A checkpoint's windows are in a fresh, unmodified model before it trains on, also where the model is built late;
    no hook is left."""
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(ConvertBatchNorm(Window(9)), saver, module=kind(), max_epochs=1)
    seen = Seen()
    saved = torch.load(saver.last_model_path, weights_only=True)["state_dict"]
    resumed, _ = fit(
        ConvertBatchNorm(Window(9)), seen, saver, module=kind(), max_epochs=2, ckpt_path=saver.last_model_path
    )
    assert seen.averages == ["Window(size=9)"] * 2
    assert seen.histories
    assert all(torch.equal(value, saved[key]) for key, value in seen.histories.items())
    assert not torch.equal(histories(resumed)["bn1.averaging.rows"], saved["bn1.averaging.rows"])
    assert resumed._load_state_dict_pre_hooks == {}


def test_plain_checkpoint_loads(tmp_path: Path) -> None:
    """A checkpoint written without the callback resumes under it, and its statistics serve until the first batch."""
    saver = ModelCheckpoint(tmp_path, save_last=True)
    plain, _ = fit(saver, max_epochs=1)
    fresh = Small()
    trainer(ConvertBatchNorm(Window(3)), saver).validate(
        fresh, loader(shuffle=False), ckpt_path=saver.last_model_path, verbose=False
    )
    assert torch.equal(fresh.bn1.running_mean, plain.bn1.running_mean)
    resumed, _ = fit(ConvertBatchNorm(Window(3)), saver, max_epochs=2, ckpt_path=saver.last_model_path)
    assert averages(resumed) == ["Window(size=3)"] * 2


def test_second_fit_keeps_the_history_and_another_average_replaces_it() -> None:
    """The same averaging again, in a new Trainer, converts nothing; another one starts anew."""
    module, _ = fit(ConvertBatchNorm(Window(30)), max_epochs=1)
    before = {key: value.clone() for key, value in histories(module).items()}
    seen = Seen()
    trainer(ConvertBatchNorm(Window(30)), seen, max_epochs=1).fit(module, loader(), loader(shuffle=False))
    assert before
    assert all(torch.equal(seen.histories[key], value) for key, value in before.items())
    trainer(ConvertBatchNorm(Window(7)), seen, max_epochs=1).fit(module, loader(), loader(shuffle=False))
    assert seen.averages == ["Window(size=7)"] * 2
    assert not any(value.any() for key, value in seen.histories.items() if not key.endswith("state_of"))


def test_layer_without_the_average_is_converted_and_the_others_keep_theirs() -> None:
    """A new head's layer gets its window, while the old layers' windows stay as they are."""
    module, _ = fit(ConvertBatchNorm(Window(30)), max_epochs=1)
    module.rest[3] = nn.BatchNorm1d(3)
    before = {key: value.clone() for key, value in histories(module).items()}
    seen = Seen()
    trainer(ConvertBatchNorm(Window(30)), seen, max_epochs=1).fit(module, loader(), loader(shuffle=False))
    assert seen.averages == ["Window(size=30)"] * 2
    assert all(torch.equal(seen.histories[key], value) for key, value in before.items())


class Decay(Averaging):
    def __init__(self, eta: float) -> None:
        super().__init__()
        self.eta = eta

    def update(self, running_mean: Tensor, running_var: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        return batch.mean * self.eta, batch.var


def test_own_average_is_known_by_its_settings() -> None:
    """An averaging of the user's, whose repr says nothing, is replaced where its argument differs."""
    module, _ = fit(ConvertBatchNorm(Decay(1.0)), max_epochs=1)
    kept = module.bn1.averaging
    trainer(ConvertBatchNorm(Decay(1.0)), max_epochs=1).fit(module, loader(), loader(shuffle=False))
    assert module.bn1.averaging is kept
    trainer(ConvertBatchNorm(Decay(0.5)), max_epochs=1).fit(module, loader(), loader(shuffle=False))
    assert module.bn1.averaging.eta == 0.5


def test_beside_weight_averaging_whatever_the_order(tmp_path: Path) -> None:
    """EMA of the weights that stands before it has copied an unconverted model: the fit, its file and the resumed fit
    work nevertheless."""
    for place, callbacks in enumerate(
        ([ConvertBatchNorm(Window(3)), EMAWeightAveraging()], [EMAWeightAveraging(), ConvertBatchNorm(Window(3))])
    ):
        saver = ModelCheckpoint(tmp_path / str(place), save_last=True)
        fit(*callbacks, saver, max_epochs=1)
        resumed, _ = fit(
            ConvertBatchNorm(Window(3)), EMAWeightAveraging(), saver, max_epochs=2, ckpt_path=saver.last_model_path
        )
        assert averages(resumed) == ["Window(size=3)"] * 2


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be meant is refused with the call to make, before the model is changed."""
    with pytest.raises(TypeError, match=r"ConvertBatchNorm\('window'\): averaging is an Averaging"):
        ConvertBatchNorm("window")
    module = Small()
    module.bn1, module.rest[3] = nn.Identity(), nn.Identity()
    with pytest.raises(MisconfigurationException, match="Small has no batch-norm layer"):
        fit(ConvertBatchNorm(Window(3)), module=module)
    built = Built()
    built.rest[3] = nn.Identity()
    monkeypatch.setattr(Built, "configure_model", lambda self: None)
    with pytest.raises(MisconfigurationException, match="Built has no batch-norm layer"):
        fit(ConvertBatchNorm(Window(3)), module=built)
    assert built._load_state_dict_pre_hooks == {}


def test_layer_that_cant_be_served_is_named() -> None:
    """The refusal has the layer's name in the model, and the layers beside it are unconverted."""
    module = Small()
    module.rest[3] = nn.BatchNorm1d(3, track_running_stats=False)
    with pytest.raises(TypeError, match=r"rest\.3 \(BatchNorm1d\): it keeps no running statistics"):
        fit(ConvertBatchNorm(Cumulative()), module=module)
    assert type(module.bn1) is nn.BatchNorm1d


def test_torchs_synchronisation_is_refused() -> None:
    """Where Lightning has replaced the converted layers by torch's, the fit stops with the plugin that would not."""
    module = Small()
    callback = ConvertBatchNorm(Exponential(0.2))
    callback.setup(trainer(), module, "fit")
    callback.on_fit_start(trainer(), module)
    TorchSyncBatchNorm().apply(module)
    with pytest.raises(
        MisconfigurationException,
        match=r"2 converted layers \(bn1, rest\.3\).*plugins=\[lightning_bn.BatchNormSync\(\)\]",
    ):
        callback.on_fit_start(trainer(), module)
