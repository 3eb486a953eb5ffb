"""What the callbacks of a real fit write into its journal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from fitting import trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from small_data import loader
from small_models import Small
from torch import nn

from lightning_bn import ActivationStatsMonitor, BatchNormRecalibration, CompareAverages, ModeCheck, Window
from lightning_bn.journal.lines import FILE_NAME
from lightning_bn.journal.reader import JournalReader, grids_of_layer


def journalled(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Return a Trainer of two epochs whose journal is in `folder`."""
    return trainer(*callbacks, **{"default_root_dir": folder, "max_epochs": 2, "log_every_n_steps": 1, **options})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]


def kinds(folder: Path) -> list[str]:
    return [line["kind"] for line in lines(folder)]


def test_a_fit_with_all_callbacks(tmp_path: Path) -> None:
    """Each thing that happened has one line, however many callbacks saw it; the numbers are the monitor's table."""
    monitor = ActivationStatsMonitor(every_n_steps=2)
    repair = BatchNormRecalibration(monitor="val_loss", num_batches=2)
    compare = CompareAverages({"window 2": Window(2)})
    fit = journalled(tmp_path, monitor, ModeCheck(), compare, repair)
    fit.fit(Small(), loader(), loader(shuffle=False))
    found = kinds(tmp_path)
    assert found[:3] == ["journal", "start", "layers"]
    assert found[-1] == "end"
    counts = {kind: found.count(kind) for kind in ("start", "epoch", "validation", "averages", "recalibration", "end")}
    assert counts == {"start": 1, "epoch": 2, "validation": 2, "averages": 2, "recalibration": 1, "end": 1}
    reader = JournalReader.of_file(tmp_path / FILE_NAME)
    rows = {(row["stage"], row["step"], row["layer"]): row for row in monitor.table()}
    assert len(rows) == sum(len(each.rows) for samples in reader.samples.values() for each in samples)
    for stage, samples in reader.samples.items():
        for sample in samples:
            for place, layer in enumerate(sample.rows):
                expected = rows[stage, sample.step, layer]
                for statistic in sample.statistics:
                    column = sample.column(statistic)
                    assert column is not None
                    value = float(column.values[place])
                    value = None if np.isnan(value) and place not in column.nans else value
                    assert value == (
                        None
                        if expected[statistic] is None
                        else pytest.approx(expected[statistic], rel=1e-4, nan_ok=True)
                    )
    recalibration = reader.events["recalibration"][0]
    assert (recalibration["kept"], recalibration["metric"]) == (repair.kept, "val_loss")
    assert reader.events["averages"][-1]["metrics"] == compare.metrics
    assert reader.samples["train"][0].rates == {"SGD": 0.3}
    described = {each["name"]: each for each in reader.whole("layers")["layers"]}
    assert described["bn1"] == {
        "name": "bn1",
        "class": "BatchNorm1d",
        "channels": 5,
        "averaging": "Exponential(momentum=0.1)",
        "momentum": 0.1,
        "affine": True,
        "frozen": False,
    }


def test_drift_of_each_channel(tmp_path: Path) -> None:
    """Where channels are kept, a batch norm's drift is there channel by channel; its rms is the table's."""
    journalled(tmp_path, ActivationStatsMonitor(every_n_steps=2)).fit(Small(), loader(), loader(shuffle=False))
    reader = JournalReader.of_file(tmp_path / FILE_NAME)
    for stage in ("train", "val"):
        kept = [each for each in reader.events["channels"] if each["stage"] == stage]
        assert kept
        samples = {sample.step: sample for sample in reader.samples[stage]}
        for event in kept:
            for layer in ("bn1", "rest.3"):
                for name in ("drift_mean", "drift_var"):
                    channels = [float(value) for value in event["layers"][layer][name]]
                    assert len(channels) == {"bn1": 5, "rest.3": 3}[layer]
                    grids = grids_of_layer([samples[event["step"]]], layer)
                    expected = grids[name].values.item()
                    rms = math.sqrt(sum(value**2 for value in channels) / len(channels))
                    assert rms == pytest.approx(expected, rel=1e-3)
                    largest = grids[f"{name}_max"].values.item()
                    assert max(map(abs, channels)) == pytest.approx(largest, rel=1e-3)
            assert "drift_mean" not in event["layers"]["rest.0"]


def test_a_model_without_batch_norm(tmp_path: Path) -> None:
    """Its activations are in the journal, and there is no drift of a channel."""
    module = Small()
    module.bn1, module.rest[3] = nn.Identity(), nn.Identity()
    journalled(tmp_path, ActivationStatsMonitor(every_n_steps=2)).fit(module, loader(), loader(shuffle=False))
    kept = [each for each in lines(tmp_path) if each["kind"] == "channels"]
    assert kept
    assert all("drift_mean" not in vectors for each in kept for vectors in each["layers"].values())


def test_layers_that_can_not_be_looked_at(tmp_path: Path) -> None:
    """A module that no forward calls is named with the reason."""

    class Spare(Small):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.ReLU()

    with pytest.warns(UserWarning, match="sees nothing of spare"):
        journalled(tmp_path, ActivationStatsMonitor(every_n_steps=2)).fit(Spare(), loader(), loader(shuffle=False))
    found = [(each["stage"], each["layers"]) for each in lines(tmp_path) if each["kind"] == "unseen"]
    assert [(stage, list(layers)) for stage, layers in found] == [("val", ["spare"]), ("train", ["spare"])]
    assert all("no forward called it as a module" in layers["spare"] for _, layers in found)


def test_findings_and_modes(tmp_path: Path) -> None:
    """What ModeCheck found is there as fields; a layer in eval mode is, from the step on."""

    class Frozen(Small):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.bn1.train(self.global_step < 4)

    check = ModeCheck(action="log")
    journalled(tmp_path, check, ActivationStatsMonitor(every_n_steps=1)).fit(Frozen(), loader(), loader(shuffle=False))
    written = [line for line in lines(tmp_path) if line["kind"] == "finding"]
    assert [(line["code"], line["step"], line["fix"]["code"]) for line in written] == [
        (finding.code, finding.step, finding.fix.code) for finding in check.findings
    ]
    assert written
    rules = {line["code"]: line["text"] for line in lines(tmp_path) if line["kind"] == "rule"}
    assert {line["code"] for line in written} <= set(rules)
    assert all(text.startswith(f"# {code} ") for code, text in rules.items())
    modes = [(line["step"], line["eval"]) for line in lines(tmp_path) if line["kind"] == "modes"]
    assert modes[0][1] == ["bn1"]
    assert modes[0][0] in (4, 5)


def test_modes_of_a_layer_that_came(tmp_path: Path) -> None:
    """A layer that the module puts in as an epoch starts, in eval mode, is named from the next epoch on."""

    class Grown(Small):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.rest.append(nn.BatchNorm1d(2).eval())

    # The module's own hook comes after the callbacks'.
    fit = journalled(tmp_path, ActivationStatsMonitor(every_n_steps=1), max_epochs=3)
    fit.fit(Grown(), loader(), loader(shuffle=False))
    epochs = {line["epoch"]: line["step"] for line in lines(tmp_path) if line["kind"] == "epoch"}
    modes = [(line["step"], line["eval"]) for line in lines(tmp_path) if line["kind"] == "modes"]
    assert modes[0][1] == ["rest.6"]
    assert modes[0][0] >= epochs[2]


def test_where_it_lies(tmp_path: Path) -> None:
    """Beside TensorBoard's files where there are any, else beside another logger's, else in default_root_dir."""
    both = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="board")]
    for loggers, place in ((both, "board/version_0"), ([both[0]], "csv/version_0"), (False, ".")):
        journalled(tmp_path, ActivationStatsMonitor(), logger=loggers, max_epochs=1).fit(
            Small(), loader(), loader(shuffle=False)
        )
        assert (tmp_path / place / FILE_NAME).is_file(), place


def test_no_trace_of_a_fast_dev_run(tmp_path: Path) -> None:
    """A fast_dev_run leaves no file."""
    journalled(tmp_path, ActivationStatsMonitor(), ModeCheck(), fast_dev_run=True).fit(
        Small(), loader(), loader(shuffle=False)
    )
    assert not list(tmp_path.rglob(FILE_NAME))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_fit_continues(tmp_path: Path) -> None:
    """The second fit's lines take the place of what the first wrote behind the checkpoint."""
    callbacks = [ActivationStatsMonitor(every_n_steps=1)]
    first = journalled(tmp_path, *callbacks, max_epochs=1)
    first.fit(Small(), loader(), loader(shuffle=False))
    first.save_checkpoint(tmp_path / "first.ckpt")
    second = journalled(tmp_path, ActivationStatsMonitor(every_n_steps=1), max_epochs=2)
    second.fit(Small(), loader(), loader(shuffle=False), ckpt_path=tmp_path / "first.ckpt")
    reader = JournalReader.of_file(tmp_path / FILE_NAME)
    assert [sample.step for sample in reader.samples["train"]] == list(range(12))
    assert [(event["step"], event["resumed"]) for event in reader.events["start"]] == [(0, False), (6, True)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_how_it_ended(tmp_path: Path, error: type[BaseException]) -> None:
    """A fit that is stopped says by what."""

    class Stopping(Small):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 3:
                raise error

    with pytest.raises((ValueError, SystemExit, KeyboardInterrupt)):
        journalled(tmp_path, ActivationStatsMonitor(), ModeCheck()).fit(Stopping(), loader(), loader(shuffle=False))
    assert [line["status"] for line in lines(tmp_path) if line["kind"] == "end"] == [error.__name__]
