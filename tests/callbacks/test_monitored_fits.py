"""ActivationStatsMonitor over whole fits: where the table lies, resumed fits, other loggers, what a sample costs."""

from __future__ import annotations

import gc
import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from fitting import fit, trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from monitored import LAYERS, ROWS, Recorder, flat, mean_std, rows
from small_data import training_data
from small_models import Small
from states import hooks
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_bn import ActivationStatsMonitor
from lightning_bn.activations.collector import to_host


def test_compiled_models_are_seen() -> None:
    """Layers inside a compiled model are measured, compiled before or after, under their own names; other steps stay
    compiled."""
    compiled_runs = []

    def backend(graph: Any, example: Any) -> Any:
        def run(*args: Any) -> Any:
            compiled_runs.append(1)
            return graph(*args)

        return run

    class Compiled(Small):
        def __init__(self) -> None:
            super().__init__()
            self.rest[1].p = 0.0
            self.rest = torch.compile(self.rest, backend=backend, fullgraph=True)

    recorder, monitor = Recorder(), ActivationStatsMonitor(every_n_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own while it compiles
        torch.manual_seed(0)
        fit(monitor, module=Compiled(), max_epochs=1, val=None)
    torch.manual_seed(0)
    plain = Small()
    plain.rest[1].p = 0.0
    fit(recorder, module=plain, max_epochs=1, val=None)
    assert list(rows(monitor, "train", 4)) == ROWS
    for name in LAYERS:
        expected = mean_std(flat([recorder.batches["train"][4][name]["output"]]))
        assert (rows(monitor, "train", 4)[name]["mean"], rows(monitor, "train", 4)[name]["std"]) == pytest.approx(
            expected, rel=1e-4, abs=1e-5
        )
    assert len(compiled_runs) == 4


def test_the_table_lies_where_the_loggers_are(tmp_path: Path) -> None:
    """Beside each logger's files, without one in default_root_dir, of the last run alone; a fast_dev_run leaves
    none."""
    runs: dict[str, Any] = {
        "fast": {"fast_dev_run": True, "logger": None},
        "none": {"logger": False},
        "csv": {"logger": [CSVLogger(tmp_path / "logs", version=0), Memory()]},
    }
    for name, options in runs.items():
        for _ in range(2):
            monitor = ActivationStatsMonitor(verbose=False)
            fit(monitor, **{"max_epochs": 1, "default_root_dir": tmp_path / name} | options)
            assert list(rows(monitor, "train", 0)) == ROWS
    found = {path.relative_to(tmp_path): path for path in tmp_path.rglob("activation_stats.csv")}
    assert set(map(str, found)) == {"none/activation_stats.csv", "logs/lightning_logs/version_0/activation_stats.csv"}
    for path in found.values():
        assert len(pd.read_csv(path)) == len(monitor.table())


def test_validate_and_test_alone() -> None:
    """trainer.validate and trainer.test give rows of their stage."""
    monitor, module = ActivationStatsMonitor(), Small()
    module.test_step = module.validation_step
    data = DataLoader(training_data(), 16)
    trainer(monitor).validate(module, data, verbose=False)
    trainer(monitor).test(module, data, verbose=False)
    assert [(row["layer"], row["stage"]) for row in monitor.table()] == [
        (name, stage) for stage in ("val", "test") for name in ROWS
    ]
    assert hooks(module) == 0


def test_several_fits_and_a_resumed_one(tmp_path: Path) -> None:
    """A fit that goes on adds to the table, at the steps that come next; one that starts anew starts a new table."""
    monitor = ActivationStatsMonitor(every_n_steps=4)
    _, runner = fit(monitor, max_epochs=1, val=None)
    runner.save_checkpoint(tmp_path / "one.ckpt")
    steps = lambda: sorted({row["step"] for row in monitor.table()})  # noqa: E731
    assert steps() == [0, 4]
    fit(monitor, max_epochs=3, val=None, ckpt_path=tmp_path / "one.ckpt")
    assert steps() == [0, 4, 8, 12, 16]
    fit(monitor, max_epochs=1, val=None)
    assert steps() == [0, 4]
    fresh = ActivationStatsMonitor(every_n_steps=4)
    fit(fresh, max_epochs=3, val=None, ckpt_path=tmp_path / "one.ckpt")
    assert sorted({row["step"] for row in fresh.table()}) == [8, 12, 16]


def test_a_model_without_a_matching_layer_is_told_once() -> None:
    """One warning, with the module's class and what to write, and an empty table; training goes on."""
    monitor = ActivationStatsMonitor("layer4.*")
    with pytest.warns(UserWarning, match=r"layers='layer4.\*'\) finds nothing to look at: Small has no module") as told:
        fit(monitor, max_epochs=1)
    assert len([one for one in told if "finds nothing" in str(one.message)]) == 1
    assert monitor.table() == []


def test_mistakes_are_told_at_once() -> None:
    """A wrong argument raises before anything is trained, with the call to make."""
    with pytest.raises(ValueError, match="at least 1, as in every_n_steps=50"):
        ActivationStatsMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match='"worst", "all"'):
        ActivationStatsMonitor(scalars=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a class"):
        fit(ActivationStatsMonitor(layers=3))  # type: ignore[arg-type]


class Memory(Logger):
    """Another's logger, which knows no more than Lightning's interface."""

    name, version = "memory", 0  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""


def test_other_loggers_get_the_scalars(tmp_path: Path) -> None:
    """Through the Logger interface: worst and median of each statistic at the sampled steps, and each layer's for
    scalars="all"."""
    memory = Memory()
    monitor = ActivationStatsMonitor(every_n_steps=3, scalars="all")
    fit(monitor, logger=[memory, CSVLogger(tmp_path, version=0)], max_epochs=1, log_every_n_steps=3)
    ours = [
        (step, metrics) for step, metrics in memory.metrics if any(name.startswith("activations") for name in metrics)
    ]
    assert [step for step, _ in ours] == [0, 3, 5]
    found = rows(monitor, "train", 3)
    metrics = ours[1][1]
    stds = [found[name]["std"] for name in LAYERS]
    assert metrics["activations/std/median"] == pytest.approx(sorted(stds)[1] / 2 + sorted(stds)[2] / 2)
    assert metrics["activations/std/worst"] == max(stds, key=lambda std: abs(math.log(std)))
    assert metrics["activations/drift_mean/worst"] == max(found[name]["drift_mean"] for name in ("bn1", "rest.3"))
    # The fourth of the rows begins with the input, as the text of the numbers has it.
    assert metrics["activations/zero_fraction/worst_layer"] in (ROWS.index("rest.0"), ROWS.index("rest.4"))
    assert metrics["activations/drift_mean/worst_layer"] in (ROWS.index("bn1"), ROWS.index("rest.3"))
    assert metrics["activations/zero_fraction/rest.0"] == found["rest.0"]["zero_fraction"]
    assert ours[2][1]["activations_val/std/bn1"] == rows(monitor, "val")["bn1"]["std"]
    assert "activations/std/median" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]


def test_one_transfer_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a sampled step no value is read from the device before the one transfer that brings all layers' to the
    host."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from lightning_bn.activations import collector, tensor_to_moments

    reads: list[str] = []
    transfers: list[int] = []
    real = collector.to_host

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default and not transfers:
                reads.append(str(func))
            return func(*args, **(kwargs or {}))

    def counted(tensors: Any) -> Any:
        transfers.append(len(tensors))
        return real(tensors)

    monkeypatch.setattr(collector, "to_host", counted)
    monkeypatch.setattr(tensor_to_moments, "_may_look", lambda data: False)  # as on an accelerator
    module = Small()
    layers = {name: layer for name, layer in module.named_modules() if name in LAYERS}
    watched = collector.LayerCollector(module, layers, gradients=True, histograms=LAYERS)
    with Reads():
        watched.attach()
        module.rest(module.bn1(module.first(torch.randn(8, 4)))).sum().backward()
        watched.detach()
        watched.collect()
    assert len(transfers) == 1
    assert reads == []


def test_memory_does_not_grow_with_the_steps() -> None:
    """Of tensors there are as many after sixty sampled steps as after twenty; what grows is the table alone."""
    alive = []

    class Counts(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step in (20, 60):
                gc.collect()
                alive.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))

    fit(Counts(), ActivationStatsMonitor(every_n_steps=1, gradients=True), max_epochs=11, val=None)
    assert alive[1] <= alive[0]


def test_sampling_is_dense_at_first() -> None:
    """Without every_n_steps the interval doubles after every 16 samples, until it is the Trainer's; 0 there is
    never."""
    monitor = ActivationStatsMonitor(verbose=False)
    fit(monitor, log_every_n_steps=4, max_epochs=12, val=None)
    steps = [*range(16), *range(16, 48, 2), *range(48, 72, 4)]
    assert sorted({row["step"] for row in monitor.table()}) == steps
    monitor = ActivationStatsMonitor()
    fit(monitor, log_every_n_steps=0, val=None)
    assert monitor.table() == []


def test_ailments_and_pictures_without_tensorboard() -> None:
    """After a run without any logger the monitor says what is sick and draws the same heat maps; what it can't draw it
    tells."""

    class Dies(Small):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                with torch.no_grad():
                    self.bn1.weight.zero_()
                    self.bn1.bias.fill_(-1.0)

    monitor = ActivationStatsMonitor(every_n_steps=2)
    fit(monitor, module=Dies(lr=0.0), val=None)
    found = {(each.layer, each.statistic): (each.first, each.value) for each in monitor.ailments()}
    assert found["rest.0", "zero_fraction"] == found["bn1", "weight_near_zero"] == (6, 1.0)
    assert monitor.picture("zero_fraction").shape[1:] == (640, 3)
    with pytest.raises(ValueError, match=r"picture\('nonsense', 'train'\).*there are std, abs_max"):
        monitor.picture("nonsense")
    with pytest.raises(ValueError, match="there are none"):
        monitor.picture("std", "val")


def test_one_transfer_keeps_every_bit() -> None:
    """Tensors of all dtypes and shapes come to the host as they are, NaN payloads and odd offsets included."""
    tensors = [
        torch.tensor(math.nan),
        torch.arange(3, dtype=torch.int8),
        torch.randn(2, 3),
        torch.randn(3, 2).T.bfloat16(),
        torch.empty(0, 4),
    ]
    tensors += [torch.tensor([True]), torch.arange(5), torch.randn(2, 1, dtype=torch.float64), torch.randn(5)]
    for one, other in zip(tensors, to_host(tensors), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert to_host([]) == []
