"""Lightning's weight-averaging callbacks beside windowed layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fitting
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from small_data import training_data
from small_models import Small
from states import matches_weights
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_bn import BatchNormRecalibration, Window, convert_batch_norm

EPOCHS, STEPS, WINDOW = 4, 5, 3
CALLBACKS: dict[str, Callable[[], pl.Callback]] = {
    "WeightAveraging, buffers": lambda: WeightAveraging(use_buffers=True),
    "WeightAveraging": lambda: WeightAveraging(use_buffers=False),
    "EMA, buffers": lambda: EMAWeightAveraging(decay=0.7, use_buffers=True),
    "EMA": lambda: EMAWeightAveraging(decay=0.7, use_buffers=False),
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1),
}


class Module(Small):
    """Its batches come from the epoch and the place in it: Lightning does not take a plain loader up in the middle of
    an epoch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rest[1].p = 0.0
        convert_batch_norm(self, Window(WINDOW))
        self.outputs: list[Tensor] = []
        self.statistics: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(data(self.current_epoch, batch_idx), batch_idx)
        self.statistics.append(self.bn1.running_mean.clone())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.outputs.append(self(data(0, 0)[0]))


def data(epoch: int, place: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * epoch + place)
    rows = training_data().tensors
    chosen = torch.randperm(len(rows[0]), generator=generator)[:16]
    return [part[chosen] for part in rows]


class SaveInMidEpoch(pl.Callback):
    """Behind all others, as Lightning's own checkpoint callback is."""

    def __init__(self, path: Path, epoch: int) -> None:
        self.path, self.epoch = path, epoch

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, 1):
            trainer.save_checkpoint(self.path)


def run(name: str, path: Path, epoch: int, ckpt_path: Path | None = None) -> Module:
    module = Module()
    trainer = fitting.trainer(CALLBACKS[name](), SaveInMidEpoch(path, epoch), max_epochs=EPOCHS, num_sanity_val_steps=0)
    loader = DataLoader(torch.zeros(STEPS), batch_size=None)
    trainer.fit(module, loader, DataLoader(torch.zeros(1), batch_size=None), ckpt_path=ckpt_path, weights_only=False)
    return module


# The batches here come from the epoch, not from the loader; SWA says when it swaps schedulers.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("name", CALLBACKS)
def test_resumed_in_mid_window(name: str, epoch: int, tmp_path: Path) -> None:
    """A run stopped in the middle of an epoch and of a window validates and ends bit for bit as one that was not."""
    whole = run(name, tmp_path / "whole.ckpt", epoch)
    resumed = run(name, tmp_path / "resumed.ckpt", epoch, tmp_path / "whole.ckpt")
    expected = whole.state_dict()
    assert set(resumed.state_dict()) == set(expected)
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert len(whole.outputs) >= EPOCHS
    for one, other in zip(reversed(resumed.outputs), reversed(whole.outputs), strict=False):
        assert torch.equal(one, other)


def test_averaged_buffers_are_averages_of_the_windows() -> None:
    """use_buffers=True: the statistics that evaluate with averaged weights are averaged by the weights' own rule."""
    module = Module()
    trainer = fitting.trainer(EMAWeightAveraging(decay=0.7), max_epochs=2, num_sanity_val_steps=0)
    loader = DataLoader(torch.zeros(STEPS), batch_size=None)
    trainer.fit(module, loader, DataLoader(torch.zeros(1), batch_size=None))
    average = module.statistics[0].double()
    for statistics in module.statistics[1:]:
        average = 0.7 * average + 0.3 * statistics.double()
    torch.testing.assert_close(module.bn1.running_mean.double(), average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CALLBACKS if name != "SWA"])
def test_recalibrated_the_averaged_model_has_statistics_of_its_own(name: str) -> None:
    """With BatchNormRecalibration, whatever use_buffers is, they are those of the training data under the averaged
    weights."""
    module = convert_batch_norm(Small(), Window(WINDOW))
    module, _ = fitting.fit(CALLBACKS[name](), BatchNormRecalibration(), module=module)
    assert matches_weights(module.state_dict())


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_swa_ends_with_a_window_over_its_own_pass(tmp_path: Path) -> None:
    """SWA's pass for the statistics leaves those of its last batches under the averaged weights, none of the training's
    before."""
    module = run("SWA", tmp_path / "unused.ckpt", EPOCHS + 1)
    inputs = [data(EPOCHS, place)[0].double() for place in range(STEPS - WINDOW, STEPS)]
    weight, bias = (parameter.detach().double() for parameter in module.first.parameters())
    expected = sum((rows @ weight.T + bias).mean(0) for rows in inputs) / WINDOW
    torch.testing.assert_close(module.bn1.running_mean.double(), expected, rtol=1e-5, atol=1e-5)
