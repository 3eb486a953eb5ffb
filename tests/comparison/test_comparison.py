"""CompareAverages tells, in one run, how validation would have gone under each average; and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fitting import fit, trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from small_data import training_data
from small_models import Small
from states import same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_bn import (
    ActivationStatsMonitor,
    BatchNormRecalibration,
    CompareAverages,
    Cumulative,
    Exponential,
    Window,
    convert_batch_norm,
)

AVERAGES = {"ema 0.1": Exponential(0.1), "window 3": Window(3), "all": Cumulative()}


def converted(averaging: Any) -> Small:
    torch.manual_seed(0)
    return convert_batch_norm(Small(), averaging)


class History(pl.Callback):
    """The validation losses, and the order of the hooks."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.losses.append(float(trainer.callback_metrics["val_loss"]))


@pytest.mark.parametrize("name", AVERAGES)
def test_each_row_is_what_a_run_with_that_average_would_have_validated(name: str) -> None:
    """The losses under an average are those of a fit of a model converted to it: training is the same, and so are
    they."""
    compare, history = CompareAverages(AVERAGES), History()
    fit(compare, val_check_interval=2)
    fit(history, module=converted(AVERAGES[name]), val_check_interval=2)
    assert len(history.losses) == 6
    assert compare.scores.values[name] == pytest.approx(history.losses, rel=1e-4)


def test_the_recalibrated_row_is_what_the_recalibration_callback_would_give() -> None:
    """The row is the validation loss of a fit with BatchNormRecalibration(when="validation"), and "own" that of one
    without."""
    compare, recalibrated, own = CompareAverages(AVERAGES), History(), History()
    fit(compare)
    fit(BatchNormRecalibration(when="validation"), recalibrated)
    fit(own)
    assert compare.scores.values["recalibrated"] == pytest.approx(recalibrated.losses, rel=1e-5)
    assert compare.scores.values["own"] == own.losses


@pytest.mark.parametrize("convert", [False, True])
def test_the_batch_row_is_validation_with_each_batch_by_itself(convert: bool) -> None:
    """The loss is that of copies whose norms are in training mode; a batch of one, which has no variance, is normalised
    with the running statistics."""
    compare, validation = CompareAverages({"all": Cumulative()}), DataLoader(training_data(33), 16)

    class Looks(Small):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            assert self.bn1.running_mean is not None  # between the forwards the layer has its buffers

    module, _ = fit(
        compare,
        ActivationStatsMonitor(verbose=False),
        module=convert_batch_norm(Looks()) if convert else Looks(),
        val=validation,
    )
    total = 0.0
    module.requires_grad_(False)
    for inputs, labels in validation:
        copied = copy.deepcopy(module).double().eval()
        for layer in (copied.bn1, copied.rest[3]):
            layer.training = len(inputs) > 1
        total += len(inputs) * float(F.cross_entropy(copied(inputs.double()), labels))
    assert compare.metrics["batch"]["val_loss"] == pytest.approx(total / 33, rel=1e-5)
    assert compare.metrics["batch"]["val_loss"] != pytest.approx(compare.metrics["own"]["val_loss"], rel=1e-3)
    assert "batch" not in compare.scores.values  # no average, and never recommended


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"val_check_interval": 2},
        {"precision": "bf16-mixed"},
        {"num_sanity_val_steps": 2, "accumulate_grad_batches": 2},
    ],
    ids=str,
)
def test_nothing_else_changes(options: dict[str, Any], tmp_path: Path) -> None:
    """Weights, statistics, random numbers, logged metrics and checkpoints are those of a fit without the callback, to
    the bit."""
    runs = []
    for version, callbacks in (("plain", []), ("compared", [CompareAverages(AVERAGES)])):
        boards = TensorBoardLogger(tmp_path, name="", version=version)
        saver = ModelCheckpoint(
            tmp_path / version / "checkpoints", monitor="val_loss", save_top_k=-1, filename="{step}"
        )
        module, runner = fit(*callbacks, saver, logger=boards, log_every_n_steps=1, **options)
        events = EventAccumulator(str(tmp_path / version))
        events.Reload()
        scalars = {
            tag: [(e.step, e.value) for e in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if "batch_norm" not in tag
        }
        runs.append((module, runner, scalars, torch.rand(3)))
    (one, runner, logged, numbers), (two, other, logged_too, numbers_too) = runs
    assert same(one.state_dict().values(), two.state_dict().values())
    assert str(runner.optimizers[0].state_dict()) == str(other.optimizers[0].state_dict())
    assert runner.callback_metrics == other.callback_metrics
    assert logged == logged_too
    assert torch.equal(numbers, numbers_too)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in two.modules())
    for path in (tmp_path / "plain/checkpoints").iterdir():
        plain, compared = (
            torch.load(tmp_path / name / "checkpoints" / path.name, weights_only=False)
            for name in ("plain", "compared")
        )
        assert same(plain["state_dict"].values(), compared["state_dict"].values())
        assert plain["loops"] == compared["loops"]


def test_the_log_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every validation metric under every average is logged at the step of the validation's own; the table ends the
    training."""
    boards = TensorBoardLogger(tmp_path, name="", version="0")
    compare = CompareAverages(AVERAGES, monitor="val_acc", mode="max")
    fit(compare, logger=boards, log_every_n_steps=1)
    events = EventAccumulator(str(tmp_path / "0"))
    events.Reload()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("batch_norm/")}
    names = [*AVERAGES, "own", "recalibrated"]
    assert tags == {
        f"batch_norm/compare/{name}/{metric}" for name in [*names, "batch"] for metric in ("val_loss", "val_acc")
    }
    own = [(event.step, event.value) for event in events.Scalars("val_acc")]
    assert [(event.step, event.value) for event in events.Scalars("batch_norm/compare/own/val_acc")] == own
    printed = capsys.readouterr().out
    lines = printed.strip().splitlines()
    assert {line.split("  ")[0] for line in lines[1:-1]} == set(names)
    assert lines[-1].startswith("Recommended: ")
    assert compare.recommended == lines[1].split("  ")[0]
    best = max(compare.scores.mean(name) for name in names)
    assert compare.scores.mean(compare.recommended) == best


def test_the_advice_is_a_call_that_can_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    """A recommended average is printed as the call that converts the model to it."""
    compare = CompareAverages({"first": Exponential(1.0), "second": Window(4)}, recalibrated=False)
    repair = BatchNormRecalibration(when="validation")
    for name, others, advice in (
        ("second", [], "convert_batch_norm(model, Window(size=4))"),
        ("own", [BatchNormRecalibration()], "the layers' own averages, as they are"),
        ("own", [repair], "the layers' own statistics, as BatchNormRecalibration(when='validation') repairs them"),
    ):
        compare.scores.values = {other: [1.0] for other in ("own", "first", "second")} | {name: [0.0]}
        compare.on_train_end(trainer(compare, *others), Small())
        assert capsys.readouterr().out.strip().splitlines()[-1].startswith(f"Recommended: {advice}")


@pytest.mark.parametrize("first", [True, False])
def test_beside_weight_averaging(first: bool) -> None:
    """The weights that are validated are those that are compared: the own row is the logged metric, whatever the
    order."""
    averaging, compare, history = EMAWeightAveraging(use_buffers=False, decay=0.8), CompareAverages(AVERAGES), History()
    plain = History()
    fit(EMAWeightAveraging(use_buffers=False, decay=0.8), plain)
    fit(*([averaging, compare] if first else [compare, averaging]), history)
    assert history.losses == plain.losses == compare.scores.values["own"]
    # The same weights under the same rule: torch's own statistics are an Exponential(0.1).
    assert compare.scores.values["ema 0.1"] == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (({},), TypeError, "averages by name"),
        (([Window(3)],), TypeError, "averages by name"),
        (({"a": 20},), TypeError, r"Window\(20\)"),
        (({"own": Window(3)},), ValueError, "choose another"),
        (({"recalibrated": Window(3)},), ValueError, "choose another"),
    ],
)
def test_a_wrong_argument_is_told_at_once(arguments: Any, error: type[Exception], text: str) -> None:
    """The call that was made and the one to make."""
    with pytest.raises(error, match=text):
        CompareAverages(*arguments)
