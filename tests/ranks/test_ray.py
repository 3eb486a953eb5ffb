"""Fits of two Ray Train workers on CPUs, where Ray is installed: `pip install 'ray[train]'`."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_data import training_data
from small_models import Small
from torch.utils.data import DataLoader

from lightning_bn import ActivationStatsMonitor, BatchNormRecalibration, BatchNormSync, ModeCheck

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.filterwarnings("default"),  # Ray warns of settings of its own
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    import ray

    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    yield
    ray.shutdown()


class Killed(pl.Callback):
    """Worker 1 is killed in step `step` of its first life."""

    def __init__(self, step: int, storage: str) -> None:
        self.step, self.done = step, Path(storage, "killed")

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == 1 and not self.done.exists():
            self.done.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def work(config: dict[str, Any]) -> None:
    """Fit as docs/recipes.md shows; what is printed is kept in the storage."""
    from ray.train import get_checkpoint
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback, prepare_trainer

    storage, said = config["storage"], io.StringIO()
    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", devices="auto", default_root_dir=storage, num_sanity_val_steps=0,
        strategy=RayDDPStrategy(), plugins=[RayLightningEnvironment()], log_every_n_steps=1,
        callbacks=[*config["callbacks"], RayTrainReportCallback()],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer = prepare_trainer(trainer)
    saved = get_checkpoint()
    data = DataLoader(training_data(), 8, shuffle=True)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(saved.as_directory()) if saved else None
        stack.enter_context(contextlib.redirect_stdout(said))
        trainer.fit(Small(), data, data, ckpt_path=folder and f"{folder}/checkpoint.ckpt")
    Path(storage, f"output of {trainer.global_rank}").write_text(said.getvalue())


def fit(storage: Path, *callbacks: pl.Callback, failures: int = 0) -> dict[str, torch.Tensor]:
    """Return the `state_dict` of ``result.checkpoint``."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    result = TorchTrainer(
        work,
        train_loop_config={"storage": str(storage), "callbacks": callbacks},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="run", storage_path=str(storage), failure_config=FailureConfig(failures)),
    ).fit()
    with result.checkpoint.as_directory() as folder:
        return torch.load(f"{folder}/checkpoint.ckpt", weights_only=False)["state_dict"]


def off(state: dict[str, torch.Tensor]) -> float:
    """How far the first layer's mean and deviation are from those of all training data: a float64 oracle."""
    weight, bias = state["first.weight"].double(), state["first.bias"].double()
    inputs = training_data().tensors[0].double() @ weight.T + bias
    mean = (state["bn1.running_mean"].double() - inputs.mean(0)) / inputs.std(0)
    deviation = state["bn1.running_var"].double().sqrt() / inputs.std(0) - 1
    return float(torch.maximum(mean.abs(), deviation.abs()).max())


def test_the_recipe_with_a_worker_that_is_killed(tmp_path: Path) -> None:
    """``result.checkpoint`` has statistics of its weights after the run was resumed; journal and table lie under the
    storage, and the journal goes on."""
    callbacks = [
        BatchNormSync(statistics_only=True),
        BatchNormRecalibration(when="validation", num_batches=None),
        ModeCheck(action="raise", ignore=["BN106", "BN208"]),
        ActivationStatsMonitor(),
    ]
    state = fit(tmp_path, *callbacks, Killed(8, str(tmp_path)), failures=1)
    assert (tmp_path / "killed").exists()
    assert off(state) < 1e-5
    assert (tmp_path / "activation_stats.csv").exists()
    lines = [json.loads(line) for line in (tmp_path / "lightning_bn.jsonl").read_text().splitlines()]
    assert [line["resumed"] for line in lines if line["kind"] == "start"] == [False, True]
    assert any(line["kind"] == "recalibration" for line in lines)


def test_the_default_does_not_reach_the_checkpoint(tmp_path: Path) -> None:
    """It was saved before the fit ended: its statistics are off, and the last sentence of the fit says so."""
    state = fit(tmp_path, BatchNormSync(statistics_only=True), BatchNormRecalibration())
    assert off(state) > 0.01
    said = (tmp_path / "output of 0").read_text()
    assert "The last checkpoint was saved before that" in said
    assert "BatchNormRecalibration(when='validation')" in said


def test_ray_takes_lightning_pytorch() -> None:
    """Where both packages are installed, as they are with this one, a `pytorch_lightning` Trainer refuses Ray's
    strategy."""
    import pytorch_lightning
    from ray.train.lightning import RayDDPStrategy

    assert issubclass(RayDDPStrategy, pl.strategies.DDPStrategy)
    with pytest.raises(ValueError, match="strategy"):
        pytorch_lightning.Trainer(strategy=RayDDPStrategy(), accelerator="cpu")
