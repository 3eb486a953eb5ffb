"""BatchNormRecalibration acts at the right moment of real fits, and training does not notice."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from fitting import fit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from small_data import loader, training_data
from small_models import Small
from states import matches_weights, parameters_equal, same, snapshot
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lightning_bn import BatchNormRecalibration


class Recorder(pl.Callback):
    """Keeps the state of the module at hooks that other callbacks read it at."""

    def __init__(self) -> None:
        self.validated: list[dict[str, Tensor]] = []
        self.at_train_end: dict[str, Tensor] = {}

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(snapshot(pl_module))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.at_train_end = snapshot(pl_module)


def test_fit_end_leaves_statistics_that_match_the_final_weights() -> None:
    """The last thing that a fit does to the statistics is to take them from all training data with the final
    weights."""
    plain, _ = fit()
    assert not matches_weights(plain.state_dict())
    callback = BatchNormRecalibration()
    module, _ = fit(callback)
    assert matches_weights(module.state_dict())
    assert callback.report is not None
    assert callback.report.samples == len(training_data())


def test_validation_sees_precise_statistics_and_the_sanity_check_does_not() -> None:
    """With when="validation" every validated model has statistics that match its weights; the sanity check moves
    nothing."""
    callback, recorder = BatchNormRecalibration(when="validation"), Recorder()
    fit(callback, recorder, num_sanity_val_steps=2)
    assert len(recorder.validated) == 6
    assert all(matches_weights(state) for state in recorder.validated)
    assert callback.state_dict()["count"] == 2


@pytest.mark.parametrize(("every", "count"), [(1, 5), (2, 2), (3, 1)])
def test_every_n_epochs(every: int, count: int) -> None:
    """every_n_epochs=n recalibrates in each n-th epoch, and nothing at the end of the fit."""
    callback = BatchNormRecalibration(when="validation", every_n_epochs=every)
    fit(callback, max_epochs=5)
    assert callback.state_dict()["count"] == count


@pytest.mark.parametrize("when", ["fit_end", "validation"])
@pytest.mark.parametrize(
    "options",
    [{}, {"val_check_interval": 0.5}, {"accumulate_grad_batches": 4}],
    ids=["plain", "mid-epoch", "accumulated"],
)
def test_training_does_not_notice(when: str, options: dict[str, Any]) -> None:
    """Weights, gradients, optimizer, steps and random numbers are those of a fit without the callback, to the bit."""
    plain, runner = fit(**options)
    after = torch.rand(3)
    module, other = fit(BatchNormRecalibration(when=when), **options)
    assert torch.equal(torch.rand(3), after)
    assert parameters_equal(plain, module)
    assert all(
        (a.grad is None) == (b.grad is None) for a, b in zip(plain.parameters(), module.parameters(), strict=True)
    )
    assert same(*[(p.grad for p in m.parameters() if p.grad is not None) for m in (plain, module)])
    assert (runner.global_step, runner.current_epoch) == (other.global_step, other.current_epoch)
    assert str(runner.optimizers[0].state_dict()) == str(other.optimizers[0].state_dict())
    assert all(m.training for m in module.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_fit_end_changes_no_logged_metric() -> None:
    """All that was logged in the fit, train and validation, is what it is without the callback, to the bit."""
    _, plain = fit()
    _, runner = fit(BatchNormRecalibration())
    assert plain.callback_metrics == runner.callback_metrics


class Shuffler(torch.utils.data.Sampler[int]):
    """A sampler that depends on how often it was iterated."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter([(i * 5 + self.passes) % 48 for i in range(48)])

    def __len__(self) -> int:
        return 48


@pytest.mark.parametrize(
    "options",
    [
        {"generator": torch.Generator()},
        {"sampler": Shuffler(), "shuffle": None},
        {"num_workers": 1, "persistent_workers": True},
        {
            "sampler": torch.utils.data.WeightedRandomSampler([1.0] * 48, 48, generator=torch.Generator()),
            "shuffle": None,
        },
    ],
    ids=["generator", "counting sampler", "persistent workers", "random sampler"],
)
def test_the_loader_goes_on_where_it_was(options: dict[str, Any]) -> None:
    """A validation in mid-epoch leaves the loader's position, generator, sampler and workers to the running epoch."""
    seen = []
    for callbacks in ([], [BatchNormRecalibration(when="validation")]):
        batches: list[Tensor] = []

        class Listener(pl.Callback):
            def on_train_batch_start(
                self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, batches: Any = batches
            ) -> None:
                batches.append(batch[0])

        fit(*callbacks, Listener(), train=loader(**copy.deepcopy(options)), val_check_interval=2)
        seen.append(batches)
    assert len(seen[0]) == 12
    assert same(*seen)


def test_a_loader_that_is_its_own_iterator_is_refused_in_mid_training() -> None:
    """Of a loader without a second pass the callback must not take batches that the fit is about to train on."""

    class Stream:
        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            return next(iter(loader()))

    with pytest.raises(MisconfigurationException, match="its own iterator"):
        fit(BatchNormRecalibration(when="validation"), train=Stream(), limit_train_batches=3, val_check_interval=2)


ORDERS = {
    "before": lambda averaging: (BatchNormRecalibration(), averaging),
    "after": lambda averaging: (averaging, BatchNormRecalibration()),
    "between": lambda averaging: (Recorder(), BatchNormRecalibration(), averaging, Recorder()),
}
AVERAGINGS = {
    "ema": lambda: EMAWeightAveraging(use_buffers=False, decay=0.8),
    "averaged": lambda: WeightAveraging(use_buffers=False),
    "swa": lambda: StochasticWeightAveraging(0.1, swa_epoch_start=1),
}


@pytest.mark.filterwarnings("ignore:.*SWALR")
@pytest.mark.parametrize("averaging", AVERAGINGS)
@pytest.mark.parametrize("order", ORDERS)
def test_fit_end_comes_after_the_averaged_weights(order: str, averaging: str) -> None:
    """Whatever the order in the list, the statistics at the end are those of the averaged weights."""
    plain, _ = fit(AVERAGINGS[averaging](), max_epochs=3)
    module, runner = fit(*ORDERS[order](AVERAGINGS[averaging]()), max_epochs=3)
    assert parameters_equal(plain, module)
    assert matches_weights(module.state_dict())
    kinds = [type(callback) for callback in runner.callbacks]
    assert kinds.index(BatchNormRecalibration) == 1 + max(
        place for place, kind in enumerate(kinds) if issubclass(kind, (WeightAveraging, StochasticWeightAveraging))
    )


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_checkpoint_of_averaged_weights_has_their_statistics(order: str, tmp_path: Path) -> None:
    """EMAWeightAveraging(use_buffers=False) and when="validation": what is validated and saved matches; training goes
    on from its own."""
    plain, _ = fit(EMAWeightAveraging(use_buffers=False, decay=0.8), ModelCheckpoint(tmp_path / "plain", save_top_k=-1))
    callbacks = [BatchNormRecalibration(when="validation"), EMAWeightAveraging(use_buffers=False, decay=0.8)]
    module, _ = fit(
        *(callbacks if order == "before" else callbacks[::-1]), ModelCheckpoint(tmp_path / "ours", save_top_k=-1)
    )
    assert parameters_equal(plain, module)
    for path in sorted((tmp_path / "plain").iterdir()):
        stale, precise = (torch.load(tmp_path / name / path.name, weights_only=False) for name in ("plain", "ours"))
        assert not matches_weights(stale["state_dict"])
        assert matches_weights(precise["state_dict"])
        assert stale["current_model_state"].keys() == precise["current_model_state"].keys()
        # Training's own statistics too: they were exchanged for the averaged model's while the latter's were
        # recalibrated.
        assert same(stale["current_model_state"].values(), precise["current_model_state"].values())


def test_a_checkpoint_saved_after_the_fit_has_the_recalibrated_statistics(tmp_path: Path) -> None:
    """With when="fit_end" too, though the averaging callback saves its own copy of the model, which was not
    recalibrated."""
    _, runner = fit(EMAWeightAveraging(use_buffers=False, decay=0.8), BatchNormRecalibration())
    runner.save_checkpoint(tmp_path / "end.ckpt")
    assert matches_weights(torch.load(tmp_path / "end.ckpt", weights_only=False)["state_dict"])


def test_fit_end_comes_before_the_last_checkpoint(tmp_path: Path) -> None:
    """A ModelCheckpoint that saves when training ends saves recalibrated statistics."""
    saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1000)
    fit(saver, BatchNormRecalibration(), val=None)
    assert matches_weights(torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"])


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("when", ["fit_end", "validation"])
def test_monitor_keeps_only_what_is_better(mode: str, when: str, tmp_path: Path) -> None:
    """Of "min" and "max" one keeps the new statistics and the other leaves the old ones, to the bit; values and
    decision are logged."""
    plain, runner = fit(max_epochs=1)
    logger = CSVLogger(tmp_path)
    callback = BatchNormRecalibration(monitor="val_loss", mode=mode, when=when)
    module, _ = fit(callback, max_epochs=1, logger=logger)
    _, rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().split("\n", 1)
    header = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    line = next(line for line in rows.splitlines() if line.split(",")[header.index("batch_norm/recalibration/kept")])
    logged = {
        name.rsplit("/", 1)[-1]: float(value)
        for name, value in zip(header, line.split(","), strict=True)
        if "batch_norm" in name
    }
    assert logged["kept"] == callback.kept
    assert callback.kept == ((logged["val_loss_after"] < logged["val_loss_before"]) == (mode == "min"))
    assert logged["val_loss_before"] == pytest.approx(float(runner.callback_metrics["val_loss"]), rel=1e-5)
    assert matches_weights(module.state_dict()) == callback.kept
    if not callback.kept:
        assert same(plain.state_dict().values(), module.state_dict().values())


def test_one_of_the_modes_keeps_and_the_other_does_not() -> None:
    """The test above is not vacuous: the two modes decide differently."""
    kept = []
    for mode in ("min", "max"):
        callback = BatchNormRecalibration(monitor="val_loss", mode=mode)
        fit(callback, max_epochs=1)
        kept.append(callback.kept)
    assert sorted(kept) == [False, True]


def test_monitoring_leaves_no_trace_in_the_fit() -> None:
    """The two extra validations change no metric, no torchmetrics state, no list of outputs and no progress count."""

    class Gathering(Small):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = torchmetrics.classification.MulticlassAccuracy(2)
            self.outputs: list[Tensor] = []
            self.history: list[int] = []
            self.steps = 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            logits = self(batch[0])
            self.accuracy(logits, batch[1])
            self.outputs.append(F.cross_entropy(logits, batch[1]))
            self.steps += 1
            self.log("val_acc", self.accuracy)

        def on_validation_epoch_end(self) -> None:
            self.history.append(len(self.outputs))
            self.log("val_loss", torch.stack(self.outputs).mean())
            self.outputs.clear()

    torch.manual_seed(0)
    plain = Gathering()
    module = copy.deepcopy(plain)
    _, runner = fit(module=plain)
    _, other = fit(BatchNormRecalibration(monitor="val_loss"), module=module)
    assert runner.callback_metrics == other.callback_metrics
    assert (plain.history, plain.steps, plain.outputs) == (module.history, module.steps, module.outputs)
    assert runner.fit_loop.state_dict() == other.fit_loop.state_dict()
    assert plain.accuracy.update_count == module.accuracy.update_count
    assert same(plain.accuracy.metric_state.values(), module.accuracy.metric_state.values())


def test_the_report_reaches_the_loggers(tmp_path: Path) -> None:
    """TensorBoard gets a handful of scalars and the report as a Markdown table; every other logger the same scalars."""
    boards = TensorBoardLogger(tmp_path, name="", version="tb")
    callback = BatchNormRecalibration()
    _, runner = fit(callback, logger=[boards, CSVLogger(tmp_path, name="", version="csv")], log_every_n_steps=1)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "batch_norm" in tag]
    names = {"batches", "mean_shift", "log_variance_ratio", "standard_error"}
    assert set(tags) == {f"batch_norm/recalibration/{name}" for name in names}
    (point,) = events.Scalars("batch_norm/recalibration/mean_shift")
    assert point.step == runner.global_step
    assert point.value == pytest.approx(max(layer.mean_shift_rms for layer in callback.report.layers), rel=1e-6)
    (text,) = events.Tensors("batch_norm/recalibration/report/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert lines[0] == str(callback.report).splitlines()[0]
    assert lines[2].startswith("| name | kind |")
    assert {line.split(" | ")[0].strip("| ") for line in lines[4:]} == {"bn1", "rest.3"}
    header = (tmp_path / "csv/metrics.csv").read_text().splitlines()[0]
    assert all(f"batch_norm/recalibration/{name}" in header for name in names)
