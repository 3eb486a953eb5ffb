"""Every callback, the plugin and the command in a Trainer of ``pytorch_lightning``, which ``lightning`` installs too.

The oracle is the same run in ``lightning.pytorch``: the two packages are one code under two names.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import processes
import pytest
import pytorch_lightning
import torch
import yaml
from fitting import trainer
from small_data import loader, training_data
from small_models import Small, SmallSteps
from states import matches_weights, same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

import lightning_bn
from lightning_bn import (
    ActivationStatsMonitor,
    BatchNormRecalibration,
    BatchNormSync,
    CompareAverages,
    ConvertBatchNorm,
    ModeCheck,
    Window,
)
from lightning_bn.cli import main

BOTH = (lightning.pytorch, pytorch_lightning)
CALLBACKS = [
    ActivationStatsMonitor(every_n_steps=2),
    BatchNormRecalibration(),
    CompareAverages({"window": Window(3)}),
    ConvertBatchNorm(Window(9)),  # longer than an epoch, so that a fit resumed needs the history
    ModeCheck(ignore=["BN302", "BN305"]),
]

each_package = pytest.mark.parametrize("pl", BOTH, ids=lambda pl: pl.__name__)


class Other(SmallSteps, pytorch_lightning.LightningModule):
    """`Small` of the other package."""


class OtherData(pytorch_lightning.LightningDataModule):
    """The tests' training data, and the same for validation."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(training_data(), 16)


def fit(pl: ModuleType, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> tuple[Any, Any]:
    """Fit the same module from the same seed in a Trainer of the package."""
    torch.manual_seed(0)
    module = Small() if pl is lightning.pytorch else Other()
    torch.manual_seed(1)
    runner = trainer(*callbacks, package=pl, **{"max_epochs": 2, **options})
    data = (loader(shuffle=False), DataLoader(training_data(), 16))
    runner.fit(module, *data, ckpt_path=ckpt_path, weights_only=False)
    return module, runner


def assert_same(one: Any, other: Any) -> None:
    """The two hold the same values, bit for bit."""
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right)
    for key, value in left.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, right[key]), key


@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda callback: type(callback).__name__)
def test_each_callback_trains_the_same(callback: Any) -> None:
    """A callback accepted as the Trainer's only one gives the weights and statistics that it gives under lightning."""
    results = [fit(pl, callbacks=copy.deepcopy(callback))[0] for pl in BOTH]
    assert_same(*results)
    for pl in BOTH:
        assert isinstance(callback, pl.Callback)


@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda callback: type(callback).__name__)
def test_each_callback_resumes_bit_for_bit(callback: Any, tmp_path: Path) -> None:
    """A fit resumed from a checkpoint ends with the weights, statistics and window of one that was never stopped."""
    whole, _ = fit(pytorch_lightning, copy.deepcopy(callback), _SeedEachStep())
    _, half = fit(pytorch_lightning, copy.deepcopy(callback), _SeedEachStep(), max_epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(pytorch_lightning, copy.deepcopy(callback), _SeedEachStep(), ckpt_path=tmp_path / "half.ckpt")
    if isinstance(callback, ConvertBatchNorm):
        assert repr(resumed.bn1.averaging) == "Window(size=9)"
    assert_same(resumed, whole)


class _SeedEachStep(pytorch_lightning.Callback):
    """Makes a step's dropout the same, whether or not other steps came before it in the process."""

    def on_train_batch_start(self, trainer: pytorch_lightning.Trainer, *_: Any) -> None:
        torch.manual_seed(trainer.global_step)


@each_package
def test_averaged_weights_are_recognised(pl: ModuleType, tmp_path: Path) -> None:
    """Placed before the averaging callback, the recalibration still measures the averaged weights, and the checkpoint
    has both."""
    ema = pl.callbacks.EMAWeightAveraging(decay=0.9, use_buffers=False)
    module, trainer = fit(pl, BatchNormRecalibration(num_batches=None), ema)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert matches_weights(module.state_dict())
    plain, _ = fit(pl, pl.callbacks.EMAWeightAveraging(decay=0.9, use_buffers=False))
    assert not matches_weights(plain.state_dict())


@each_package
def test_nothing_is_logged_and_no_step_is_taken(pl: ModuleType, tmp_path: Path) -> None:
    """A pass through training_step leaves no trace: the curves, the number of steps and the weights are the plain
    fit's."""
    curves, modules = [], []
    for name, callbacks in (
        ("plain", ()),
        ("with", (BatchNormRecalibration(when="validation", monitor="val_loss", forward=_step),)),
    ):
        logger = pl.loggers.TensorBoardLogger(str(tmp_path), name=name, version="")
        module, trainer = fit(pl, *callbacks, logger=logger, log_every_n_steps=1)
        logger.finalize("success")
        events = EventAccumulator(str(tmp_path / name)).Reload()
        curves.append([(event.step, event.value) for event in events.Scalars("train_loss")])
        modules.append((list(module.parameters()), trainer.global_step))
    assert curves[0] == curves[1]
    assert len(curves[0]) == 12
    assert same(modules[0][0], modules[1][0])
    assert modules[0][1] == modules[1][1]


def _step(module: Any, batch: Any) -> None:
    module.training_step(batch, 0)


@each_package
def test_pictures_are_written(pl: ModuleType, tmp_path: Path) -> None:
    """The monitor finds the package's own TensorBoardLogger: heat maps, the text and the table's file are there."""
    logger = pl.loggers.TensorBoardLogger(str(tmp_path), name="", version="")
    fit(pl, ActivationStatsMonitor(every_n_steps=2, heatmaps=True), logger=logger)
    logger.finalize("success")
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert any(tag.startswith("activations") for tag in tags["images"])
    assert (tmp_path / "activation_stats.csv").exists()


def _wrong(pl: ModuleType) -> list[str]:
    """What ModeCheck finds where a validation step trains: the codes."""
    check = ModeCheck(action="log")

    class Wrong(pl.Callback):  # type: ignore[misc, name-defined]
        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            pl_module.train()

    fit(pl, Wrong(), check)
    return sorted(finding.code for finding in check.findings if finding.level == "error")


def test_mistakes_are_found_alike() -> None:
    """A validation in training mode is an error in either package, by the same rules."""
    found = [_wrong(pl) for pl in BOTH]
    assert found[0] == found[1]
    assert found[0]


def test_compared_averages_are_the_same() -> None:
    """The table of averages holds the same numbers in either package."""
    compared = [CompareAverages({"window": Window(3)}) for _ in BOTH]
    for pl, each in zip(BOTH, compared, strict=True):
        fit(pl, each)
    assert compared[0].metrics == compared[1].metrics
    assert set(compared[0].metrics) == {"own", "window", "recalibrated", "batch"}


@each_package
def test_own_errors_are_caught_by_either_name(pl: ModuleType) -> None:
    """What the callbacks raise for a wrong set-up is a MisconfigurationException of the user's package."""
    saver = pl.callbacks.ModelCheckpoint(save_last=False)
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="no 'last' checkpoint"):
        fit(pl, BatchNormRecalibration(checkpoints=["last"]), saver, enable_checkpointing=True)


def _fit_two(rank: int, world: int, folder: Path, port: int) -> tuple[torch.Tensor, str]:
    processes.environment(rank, world, port)
    options = {"strategy": "ddp", "devices": world, "plugins": [BatchNormSync()], "sync_batchnorm": True}
    module, _ = fit(pytorch_lightning, **options, num_sanity_val_steps=0, max_epochs=1)
    return module.bn1.running_mean, type(module.bn1).__name__


def test_the_plugin_in_two_processes(tmp_path: Path) -> None:
    """Trainer(plugins=[BatchNormSync()], sync_batchnorm=True) is accepted, replaces no layer, and the ranks' statistics
    are the same."""
    (one, kind), (other, _) = processes.results(_fit_two, 2, tmp_path, processes.free_port())
    assert kind == "BatchNorm1d"
    assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`recalibrate` builds a model of either package from its config, and writes statistics that match its weights."""
    _, trainer = fit(pytorch_lightning, ConvertBatchNorm(Window(3)))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    window = {"class_path": "lightning_bn.Window", "init_args": {"size": 3}}
    config = {
        "seed_everything": 1,
        "model": {"class_path": "test_both_lightnings.Other"},
        "data": {"class_path": "test_both_lightnings.OtherData"},
        "trainer": {
            "accelerator": "cpu",
            "callbacks": [
                {"class_path": "lightning_bn.ConvertBatchNorm", "init_args": {"averaging": window}},
                {"class_path": "pytorch_lightning.callbacks.LearningRateMonitor"},
            ],
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    options = ["--config", str(tmp_path / "config.yaml"), "--ckpt_path", str(tmp_path / "run.ckpt"), "--json"]
    assert main(["recalibrate", *options]) == 0
    assert json.loads(capsys.readouterr().out)["batches"] == 6
    state = torch.load(tmp_path / "run-recalibrated.ckpt", weights_only=True)["state_dict"]
    assert matches_weights(state)
    assert lightning_bn.to_torch(Other()).load_state_dict(state, strict=False)


SPEAKS = {
    "import lightning.pytorch": "lightning.pytorch",
    "import pytorch_lightning": "pytorch_lightning",
    "import lightning.pytorch, pytorch_lightning": "pytorch_lightning",
    "import torchmetrics": "lightning.pytorch",
}
"""Whose logger Lightning speaks through after which imports."""

_SPEAKS = """
import os, sys
import matplotlib.pyplot, scipy.signal, torch._dynamo  # what takes longest, and imports none of those in question
assert not {"lightning", "pytorch_lightning", "lightning_utilities", "torchmetrics"} & set(sys.modules)
for imports in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        exec(imports)
        from lightning_bn import ModeCheck
        import lightning_utilities.core.rank_zero as rank_zero
        print(rank_zero.log.name, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_lightning_goes_on_speaking_through_the_logger_of_the_package_in_use() -> None:
    """A level that a user set for the package they imported stays in force, though this package imports both."""
    command = [sys.executable, "-W", "ignore", "-c", _SPEAKS, *SPEAKS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"{package}.utilities.rank_zero" for package in SPEAKS.values()]
