"""CompareAverages in fits that stop early, resume, stream, compile, freeze or fail, and the fits that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fitting import fit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from small_data import loader, training_data
from small_models import Small
from states import same
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_bn import (
    CompareAverages,
    Cumulative,
    Exponential,
    Window,
)

AVERAGES = {"window 3": Window(3), "all": Cumulative()}


def test_beside_early_stopping() -> None:
    """The extra validations are not seen by callbacks that count them."""
    counts = []
    for callbacks in ([], [CompareAverages(AVERAGES)]):
        stopping = EarlyStopping("val_loss", patience=0, min_delta=100.0)
        _, runner = fit(*callbacks, stopping, max_epochs=5)
        counts.append((runner.current_epoch, stopping.wait_count))
    assert counts[0] == counts[1]
    assert counts[0][0] < 5


def test_resuming_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    """Followers and scores are in the checkpoint: the resumed comparison is that of an uninterrupted run."""
    whole = CompareAverages(AVERAGES)
    fit(whole, max_epochs=3, train=loader(shuffle=False), module=NoDropout())
    fit(
        CompareAverages(AVERAGES),
        ModelCheckpoint(tmp_path, save_last=True),
        max_epochs=1,
        train=loader(shuffle=False),
        module=NoDropout(),
    )
    resumed, saver = CompareAverages(AVERAGES), ModelCheckpoint(tmp_path / "next")
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        fit(
            resumed,
            saver,
            max_epochs=3,
            train=loader(shuffle=False),
            module=NoDropout(),
            ckpt_path=tmp_path / "last.ckpt",
        )
    assert resumed.scores.values == whole.scores.values


class NoDropout(Small):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.rest[1].p = 0.0


def test_steps_that_gather_and_count() -> None:
    """Lists, counters and hooks of the user's own validation see one validation an epoch."""

    class Gathering(Small):
        def __init__(self) -> None:
            super().__init__()
            self.outputs: list[Tensor] = []
            self.sizes: list[int] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.outputs.append(F.cross_entropy(self(batch[0]), batch[1]))

        def on_validation_epoch_end(self) -> None:
            self.sizes.append(len(self.outputs))
            self.log("val_loss", torch.stack(self.outputs).mean())
            self.outputs.clear()

    module = Gathering()
    compare = CompareAverages(AVERAGES)
    fit(compare, module=module, num_sanity_val_steps=0)
    assert module.sizes == [3, 3]
    assert all(len(values) == 2 for values in compare.scores.values.values())


def test_several_validation_loaders() -> None:
    """Metrics keep the names that Lightning gives them for each loader."""

    class Two(Small):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    compare = CompareAverages(AVERAGES, monitor="val_loss/dataloader_idx_1")
    _, runner = fit(compare, module=Two(), val=[DataLoader(training_data(), 16), DataLoader(training_data(), 8)])
    assert compare.scores.values["own"][-1] == float(runner.callback_metrics["val_loss/dataloader_idx_1"])


def test_a_stream_and_limits() -> None:
    """max_epochs=-1 with max_steps, streams without length, limits on both sets."""

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            while True:
                yield from training_data()

    compare = CompareAverages(AVERAGES)
    stream = DataLoader(Stream(), 8)
    fit(compare, train=stream, val=stream, max_epochs=-1, max_steps=8, val_check_interval=4, limit_val_batches=2)
    assert all(len(values) == 2 for values in compare.scores.values.values())
    fit(CompareAverages(AVERAGES), fast_dev_run=True)


@pytest.mark.parametrize("stage", ["on_train_batch_end", "on_validation_batch_end"])
def test_no_hook_is_left_when_the_fit_fails(stage: str) -> None:
    """An exception in training or in validation leaves neither hooks nor foreign statistics."""
    plain, module = Small(), Small()

    class Failing(pl.Callback):
        pass

    def fail(self: Any, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            raise ValueError("injected")

    setattr(Failing, stage, fail)
    torch.manual_seed(0)
    module.load_state_dict(plain.state_dict())
    for each, callbacks in ((plain, []), (module, [CompareAverages(AVERAGES)])):
        with pytest.raises(ValueError, match="injected"):
            fit(*callbacks, Failing(), module=each)
    assert not any(part._forward_hooks for part in module.modules())
    assert same(plain.state_dict().values(), module.state_dict().values())


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_model_is_followed() -> None:
    """torch.compile before the fit: the hooks are compiled along at the first batch."""
    module = Small()
    module.rest = torch.compile(module.rest, backend="eager")
    compare = CompareAverages({"ema": Exponential(0.1)}, recalibrated=False)
    fit(compare, module=module)
    assert compare.scores.values["ema"] == pytest.approx(compare.scores.values["own"], rel=1e-5)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_layer_that_is_not_seen_ends_the_comparison() -> None:
    """Compiled and run before the fit: hooks that come later are never called, and no row would be right."""
    module = Small()
    module.rest = torch.compile(module.rest, backend="eager")
    fit(module=module)
    unseeing = CompareAverages({"ema": Exponential(0.1)}, recalibrated=False)
    with pytest.warns(UserWarning, match=r"has stopped.*did not see rest\.3 run.*torch\.compiler\.reset\(\)"):
        fit(unseeing, module=module)
    assert unseeing.recommended is None
    torch.compiler.reset()
    fit(CompareAverages({"ema": Exponential(0.1)}, recalibrated=False), module=module)


def test_fits_that_can_not_be_served() -> None:
    """No validation, no layers, no such metric."""
    with pytest.raises(MisconfigurationException, match="no validation to compare by"):
        fit(CompareAverages(AVERAGES), val=None)
    with pytest.raises(MisconfigurationException, match="val_loss, val_acc"):
        fit(CompareAverages(AVERAGES, monitor="val_f1"))
    with pytest.warns(UserWarning, match=r"has stopped.*val_loss, val_acc"):
        fit(CompareAverages(AVERAGES, monitor="val_f1"), num_sanity_val_steps=0)

    class Bare(Small):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.rest[3] = nn.Identity(), nn.Identity()

    with pytest.raises(MisconfigurationException, match="no batch-norm layer"):
        fit(CompareAverages(AVERAGES), module=Bare())


def test_a_frozen_model_has_no_recalibrated_row() -> None:
    """With nothing that learns there is nothing to recalibrate, and the rest of the table stands."""
    torch.manual_seed(0)
    module = Small()
    for layer in (module.bn1, module.rest[3]):
        layer.requires_grad_(False).eval()
    compare = CompareAverages(AVERAGES)
    with pytest.warns(UserWarning, match="in eval mode at the start"):
        fit(compare, module=module)
    assert set(compare.scores.values) == {"own", *AVERAGES}
    assert compare.scores.values["window 3"] == compare.scores.values["own"]


def test_a_rich_progress_bar_lives_on() -> None:
    """The bar's drawing thread looks for the bar among the Trainer's callbacks, also while validation is run once
    more."""
    pytest.importorskip("rich")
    bar, seen = pl.callbacks.RichProgressBar(), []

    class Looking(Small):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            found = self.trainer.progress_bar_callback
            seen.append((isinstance(found, pl.callbacks.RichProgressBar), found is bar))

    fit(CompareAverages(AVERAGES), bar, module=Looking(), enable_progress_bar=True)
    assert all(there for there, _ in seen)
    assert not all(own for _, own in seen)  # the stand-in, which hears of no hook


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.parametrize("training", [True, False])
def test_an_averaged_copy_with_buffers_is_left_as_it_is(training: bool) -> None:
    """A copy whose buffers somebody else writes was not missed, and no average of batches is put into it."""
    seen: list[torch.Tensor] = []  # outside of the module, whose own lists are put back after a further validation

    class Averaged(Small):
        def __init__(self) -> None:
            super().__init__()
            self.copy = Small().train(training).requires_grad_(False)

        def on_train_batch_end(self, *args: Any) -> None:
            own = dict(self.named_buffers())
            for name, buffer in self.copy.named_buffers():
                buffer.copy_(own[name])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            seen.append(self.copy.bn1.running_mean.clone())

    module = Averaged()
    compare = CompareAverages({"window": Window(2)}, recalibrated=False, batch=False)
    fit(compare, module=module, num_sanity_val_steps=0, max_epochs=1)
    half = len(seen) // 2
    assert half > 0
    assert same(seen[:half], seen[half:]), "under the window and under its own"
    assert same([module.copy.bn1.running_mean], [seen[-1]])
