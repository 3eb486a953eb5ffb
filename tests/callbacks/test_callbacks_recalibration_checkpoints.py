"""Recalibrated copies of checkpoint files: whole or not there, and the originals as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitting import fit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from small_models import Small
from states import matches_weights, same
from torch import Tensor

from lightning_bn import BatchNormRecalibration


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("averaged", [False, True])
def test_best_and_last_get_a_recalibrated_copy(averaged: bool, tmp_path: Path) -> None:
    """Each copy has the file's own weights with the statistics that match them, and all else as it was; so has the
    module."""
    averaging = [EMAWeightAveraging(use_buffers=False, decay=0.8)] if averaged else []
    plain, _ = fit(*averaging, ModelCheckpoint(tmp_path / "plain", monitor="val_loss", save_last=True), max_epochs=4)
    saver = ModelCheckpoint(tmp_path / "ours", monitor="val_loss", save_last=True, filename="{epoch}-{val_loss:.3f}")
    averaging = [EMAWeightAveraging(use_buffers=False, decay=0.8)] if averaged else []
    module, _ = fit(*averaging, saver, BatchNormRecalibration(checkpoints=("best", "last")), max_epochs=4)
    assert same(plain.parameters(), module.parameters())
    assert matches_weights(module.state_dict())
    files = {path.name for path in (tmp_path / "ours").iterdir()}
    best = Path(saver.best_model_path)
    assert files == {best.name, "last.ckpt", f"{best.stem}-recalibrated.ckpt", "last-recalibrated.ckpt"}
    for name in (best.name, "last.ckpt"):
        before = torch.load(best.with_name(name), weights_only=False)
        after = torch.load(best.with_name(name.replace(".ckpt", "-recalibrated.ckpt")), weights_only=False)
        assert not matches_weights(before["state_dict"])
        assert matches_weights(after["state_dict"])
        changed = {
            key for key, value in before["state_dict"].items() if not torch.equal(value, after["state_dict"][key])
        }
        assert changed == {f"{layer}.running_{name}" for layer in ("bn1", "rest.3") for name in ("mean", "var")}
        assert all(str(value) == str(after[key]) for key, value in before.items() if key != "state_dict")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_fit_can_go_on_from_a_recalibrated_copy(tmp_path: Path) -> None:
    """The copy is a checkpoint like any other."""
    fit(ModelCheckpoint(tmp_path, save_last=True), BatchNormRecalibration(checkpoints=("last",)))
    copy = tmp_path / "last-recalibrated.ckpt"
    callback = BatchNormRecalibration()
    module, runner = fit(callback, ModelCheckpoint(tmp_path / "two"), max_epochs=3, ckpt_path=copy)
    assert runner.current_epoch == 3
    assert matches_weights(module.state_dict())


def test_a_failure_leaves_the_files_and_the_module(tmp_path: Path) -> None:
    """An exception while a file is recalibrated: no copy, no rest, and the module has its own weights and statistics
    again."""
    saver = ModelCheckpoint(tmp_path, save_last=True)
    calls = 0

    def forward(module: Any, batch: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:  # six batches for the module itself
            raise ValueError("injected")
        module(batch[0])

    torch.manual_seed(0)
    plain, _ = fit(BatchNormRecalibration())
    torch.manual_seed(0)
    module = Small()
    with pytest.raises(ValueError, match="injected"):
        fit(saver, BatchNormRecalibration(forward=forward, checkpoints=("last",)), module=module)
    assert same(plain.state_dict().values(), module.state_dict().values())
    assert not [name for name in contents(tmp_path) if "recalibrated" in name]


def test_kinds_without_a_file() -> None:
    """Where the Trainer will not write a file of that kind, the fit does not begin."""
    with pytest.raises(MisconfigurationException, match="save_last=True"):
        fit(ModelCheckpoint(), BatchNormRecalibration(checkpoints=("best", "last")))


def test_no_file_after_fast_dev_run(tmp_path: Path) -> None:
    """fast_dev_run writes no checkpoints, hence no copies, and does not complain."""
    fit(ModelCheckpoint(tmp_path), BatchNormRecalibration(checkpoints=("best",)), fast_dev_run=True)
    assert not list(tmp_path.iterdir())


def test_a_remote_directory_is_refused(tmp_path: Path) -> None:
    """Files can be renamed atomically on a local disk alone."""
    with pytest.raises(MisconfigurationException, match="not on a local disk"):
        fit(ModelCheckpoint("memory://checkpoints"), BatchNormRecalibration(checkpoints=("best",)))


def test_state_dict_values_are_plain(tmp_path: Path) -> None:
    """The callback's state is small and loads with weights_only=True."""
    fit(ModelCheckpoint(tmp_path, save_last=True, save_weights_only=False), BatchNormRecalibration(when="validation"))
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)["callbacks"][
        "BatchNormRecalibration{'when': 'validation'}"
    ]
    assert state == {"count": 2, "last_step": 12}
    assert not any(isinstance(value, Tensor) for value in state.values())


def test_a_frozen_model_gets_no_copies(tmp_path: Path) -> None:
    """With nothing that learns there is nothing to recalibrate, in the module and in its files."""
    torch.manual_seed(0)
    module = Small()
    for layer in (module.bn1, module.rest[3]):
        layer.requires_grad_(False).eval()
    with (
        pytest.warns(UserWarning, match="every batch-norm layer is frozen"),
        pytest.warns(UserWarning, match="in eval mode at the start"),
    ):
        fit(ModelCheckpoint(tmp_path, save_last=True), BatchNormRecalibration(checkpoints=("last",)), module=module)
    assert not [name for name in contents(tmp_path) if "recalibrated" in name]


def test_the_end_of_a_fit_says_which_files_are_from_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files that Lightning saves by default have the old statistics, and nothing else tells; not those with a
    recalibrated copy, nor those that were saved after the recalibration of a validation."""

    def said(callback: BatchNormRecalibration, name: str) -> str:
        capsys.readouterr()
        fit(callback, ModelCheckpoint(tmp_path / name, filename="best", save_last=True))
        return next(line for line in capsys.readouterr().out.splitlines() if "BatchNormRecalibration:" in line)

    plain = said(BatchNormRecalibration(), "plain")
    assert "2 batch norms were recalibrated; " in plain
    assert f"--ckpt_path {tmp_path}/plain/best.ckpt" in plain
    assert "last.ckpt" in plain.partition("with the old statistics:")[2].partition("A copy")[0]
    assert "old statistics" not in said(BatchNormRecalibration(checkpoints=("best", "last")), "copies")
    assert "old statistics" not in said(BatchNormRecalibration(when="validation"), "validation")


def test_a_second_recalibration_says_that_there_was_nothing_to_repair(capsys: pytest.CaptureFixture[str]) -> None:
    """Not which layer was furthest off, by 0."""
    fit(BatchNormRecalibration(when="validation"), BatchNormRecalibration())
    first, second = [line for line in capsys.readouterr().out.splitlines() if "BatchNormRecalibration:" in line]
    assert "furthest off" in first
    assert "2 batch norms were recalibrated; they fitted already." in second


@pytest.mark.parametrize("when", ["fit_end", "validation"])
def test_a_checkpoint_that_somebody_else_saved_before(
    when: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Ray Train does, at the end of each epoch: with the default the file has the old statistics, and that is said;
    with those of a validation it has the new ones."""

    class Saves(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "theirs.ckpt")

    fit(Saves(), BatchNormRecalibration(when=when))
    said = next(line for line in capsys.readouterr().out.splitlines() if "BatchNormRecalibration:" in line)
    assert ("last checkpoint was saved before that" in said) is (when == "fit_end")
    state = torch.load(tmp_path / "theirs.ckpt", weights_only=False)["state_dict"]
    assert matches_weights(state) is (when == "validation")
