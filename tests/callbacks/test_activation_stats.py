"""ActivationStatsMonitor in real fits: what it measures, and what it must survive."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
import torch
from fitting import fit
from monitored import LAYERS, Recorder, drift_of, flat, mean_std, rows
from small_models import Small
from states import hooks, parameters_equal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import ActivationStatsMonitor, BatchNorm1d, Window


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d, lambda width: BatchNorm1d(width, averaging=Window(3))], ids=["torch's", "window"]
)
def test_training_is_measured_at_every_nth_step(layer: Any) -> None:
    """Each row of the table is what loops over the recorded activations, gradients and buffers of that step give."""
    module = Small()
    module.bn1, module.rest[3] = layer(5), layer(3)
    recorder = Recorder()
    monitor = ActivationStatsMonitor(every_n_steps=3, gradients=True)
    fit(recorder, monitor, module=module, max_epochs=2)
    steps = sorted({row["step"] for row in monitor.table() if row["stage"] == "train"})
    assert steps == [0, 3, 6, 9]
    weighted = ["input", "first", "bn1", "rest.0", "rest.2", "rest.3", "rest.4", "rest.5"]
    assert [row["layer"] for row in monitor.table()[:8]] == weighted
    for step in steps:
        batch, found = recorder.batches["train"][step], rows(monitor, "train", step)
        for name in LAYERS:
            outputs = flat([batch[name]["output"]])
            mean, std = mean_std(outputs)
            row = found[name]
            assert (row["mean"], row["std"]) == (pytest.approx(mean, abs=1e-6), pytest.approx(std, rel=1e-6))
            assert row["abs_max"] == pytest.approx(max(map(abs, outputs)))
            assert row["nonfinite"] == 0
            assert row["grad_std"] == pytest.approx(mean_std(flat([batch[name]["gradient"]]))[1], rel=1e-5)
        for name in ("rest.0", "rest.4"):
            assert found[name]["zero_fraction"] == pytest.approx(
                flat([batch[name]["output"]]).count(0) / batch[name]["output"].numel()
            )
            assert found[name]["drift_mean"] is None
        for name in ("bn1", "rest.3"):
            drift_mean, drift_var = drift_of([batch[name]["input"]], batch[f"{name}/buffers"])
            assert found[name]["drift_mean"] == pytest.approx(drift_mean, rel=1e-3)
            assert found[name]["drift_var"] == pytest.approx(drift_var, rel=1e-3)
            assert found[name]["zero_fraction"] is None
    last = rows(monitor, "train", 9)["bn1"]
    weight = module.bn1.weight.detach()
    after = recorder.batches["train"][10]["bn1/buffers"]  # the next step's: parameters as they were after step 9
    assert (last["weight_min"], last["weight_max"]) == (after["weight"].min().item(), after["weight"].max().item())
    assert not torch.equal(after["weight"], weight)


def test_validation_is_measured_over_the_whole_epoch() -> None:
    """Validation rows pool all batches of the epoch; drift is that of the inputs to the running statistics in use."""
    recorder, monitor = Recorder(), ActivationStatsMonitor()
    fit(recorder, monitor, max_epochs=1, num_sanity_val_steps=2)
    batches = recorder.batches["val"][-3:]
    found = rows(monitor, "val")
    assert {row["step"] for row in monitor.table() if row["stage"] == "val"} == {
        5
    }  # where Lightning files val_loss too
    for name in LAYERS:
        mean, std = mean_std(flat([batch[name]["output"] for batch in batches]))
        assert (found[name]["mean"], found[name]["std"]) == (
            pytest.approx(mean, abs=1e-6),
            pytest.approx(std, rel=1e-6),
        )
    for name in ("bn1", "rest.3"):
        expected = drift_of([batch[name]["input"] for batch in batches], batches[0][f"{name}/buffers"])
        assert (found[name]["drift_mean"], found[name]["drift_var"]) == pytest.approx(expected, rel=1e-5)


class Dying(Small):
    """Gives a ReLU 64 channels of a batch of 256, of which some die for good at step 5, and one fires now and then."""

    def __init__(self, dying: int) -> None:
        super().__init__()
        self.dying = dying
        self.norm, self.relu = nn.BatchNorm1d(64), nn.ReLU()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        data = torch.randn(256, 64)
        data[:, 63] -= 2.5  # fires in one of 160
        data[:, : self.dying] -= 100.0 * (self.global_step >= 5)
        self.relu(self.norm(data) * 0 + data)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("dying", [1, 64])
def test_channels_are_dead_from_when_they_died(dying: int) -> None:
    """One of 64 is counted by itself, at the very sample after which it fires no more; one that fires now and then is
    alive."""
    monitor = ActivationStatsMonitor("relu", every_n_steps=1)
    fit(monitor, module=Dying(dying), val=None, max_epochs=2)
    found = [row for row in monitor.table() if row["layer"] == "relu"]
    assert [row["died_channels"] for row in found] == [0.0] * 5 + [float(dying)] * 7
    assert [row["dead_fraction"] for row in found] == [0.0] * 5 + [dying / 64] * 7
    (episode,) = [each for each in monitor.episodes() if each.statistic == "died_channels"]
    assert (episode.layer, episode.first, episode.recovered) == ("relu", 5, False)


def test_dead_channels_of_a_validation_are_its_own() -> None:
    """A channel that is dead in one validation counts as dead there, however alive it was in the validation before."""

    class Dies(Small):
        def on_validation_epoch_start(self) -> None:
            if self.current_epoch == 1:
                with torch.no_grad():
                    self.bn1.weight.zero_()
                    self.bn1.bias.fill_(-1.0)

    monitor = ActivationStatsMonitor(layers="rest.0")
    fit(monitor, module=Dies(lr=0.0), num_sanity_val_steps=0)
    found = [row["dead_fraction"] for row in monitor.table() if (row["stage"], row["layer"]) == ("val", "rest.0")]
    assert found == [0.0, 1.0]


def test_training_is_the_same_to_the_bit() -> None:
    """Weights, buffers and the random numbers drawn are the same with and without the monitor, all options on."""
    plain, _ = fit(val=None)
    state = torch.get_rng_state()
    watched, _ = fit(ActivationStatsMonitor(every_n_steps=1, gradients=True, histograms=True), val=None)
    assert parameters_equal(plain, watched)
    assert all(torch.equal(one, other) for one, other in zip(plain.buffers(), watched.buffers(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_hooks_are_there_only_while_they_are_wanted() -> None:
    """Between the sampled steps, and after the fit, no module has a hook."""
    seen = {}

    class Counts(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen[self.trainer.global_step] = hooks(self)
            return super().training_step(batch, batch_idx)

    module, _ = fit(ActivationStatsMonitor(every_n_steps=4), module=Counts(), max_epochs=1)
    assert [step for step, number in seen.items() if number] == [0, 4]
    assert hooks(module) == 0


def test_forwards_between_two_sampled_steps_are_not_seen() -> None:
    """Where every step is sampled, what the module runs between two of them, and an evaluation in the middle of the
    epoch, are not in the samples of training."""

    class Between(Small):
        def on_train_batch_end(self, *args: Any) -> None:
            with torch.no_grad():
                self.eval()(1e3 * torch.ones(2, 4))
                self.train()

    far = DataLoader(TensorDataset(1e3 * torch.ones(8, 4), torch.zeros(8, dtype=torch.int64)), 4)
    near = DataLoader(TensorDataset(torch.ones(8, 4), torch.zeros(8, dtype=torch.int64)), 4)
    tables = []
    for make, val in ((Small, near), (Between, far)):
        torch.manual_seed(0)
        monitor = ActivationStatsMonitor(every_n_steps=1)
        fit(monitor, module=make(), val=val, max_epochs=1, val_check_interval=2)
        tables.append([row for row in monitor.table() if row["stage"] == "train"])
    assert len(tables[0]) > 6 * 4
    assert str(tables[1]) == str(tables[0])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", ["training", "validation"])
def test_an_exception_leaves_no_hook_behind(error: type[BaseException], stage: str) -> None:
    """Whatever is raised in the middle of a watched step, the model is without hooks, and the table has what came
    before."""

    class Fails(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if stage == "training" and batch_idx == 3:
                raise error("stop")
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if stage == "validation":
                raise error("stop")

    module, monitor = Fails(), ActivationStatsMonitor(every_n_steps=1)
    with pytest.raises((error, SystemExit)):
        fit(monitor, module=module, num_sanity_val_steps=0)
    assert hooks(module) == 0
    assert {row["step"] for row in monitor.table()} == set(range(3 if stage == "training" else 6))
    fit(monitor, max_epochs=1)  # and it can be used again
    assert len({row["step"] for row in monitor.table() if row["stage"] == "train"}) == 6


def test_accumulated_batches_are_one_sample() -> None:
    """With accumulate_grad_batches=3, one row pools the three batches of its optimizer step, and validation between
    them does not enter."""
    recorder, monitor = Recorder(), ActivationStatsMonitor(every_n_steps=1)
    fit(recorder, monitor, accumulate_grad_batches=3, max_epochs=1, val_check_interval=2)
    assert sorted({row["step"] for row in monitor.table() if row["stage"] == "train"}) == [0, 1]
    for step in (0, 1):
        batches = recorder.batches["train"][3 * step : 3 * step + 3]
        mean, std = mean_std(flat([batch["rest.0"]["output"] for batch in batches]))
        row = rows(monitor, "train", step)["rest.0"]
        assert (row["mean"], row["std"]) == (pytest.approx(mean), pytest.approx(std))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_is_no_second_sample(reentrant: bool) -> None:
    """Under activation checkpointing rows are what they are without it, gradients included; NaNs are counted once."""

    class Checkpointed(Small):
        def __init__(self, on: bool) -> None:
            super().__init__()
            self.on = on
            self.rest[1].p = 0.0
            self.bn1, self.rest[3] = BatchNorm1d(5), BatchNorm1d(3)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.bn1(self.first(inputs))
            if self.trainer.global_step == 5:
                hidden[0, 0] = math.nan
            return checkpoint(self.rest, hidden, use_reentrant=reentrant) if self.on else self.rest(hidden)

    tables = []
    for on in (False, True):
        torch.manual_seed(0)
        monitor = ActivationStatsMonitor(every_n_steps=1, gradients=True)
        fit(monitor, module=Checkpointed(on), max_epochs=1, val=None)
        tables.append(monitor.table())
    pd.testing.assert_frame_equal(*(pd.DataFrame(table) for table in tables))
    assert rows(monitor, "train", 5)["rest.0"]["nonfinite"] == 1
