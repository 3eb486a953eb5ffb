"""Fits of sharded models, which the tests of each kind of sharding share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitting import trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from processes import own_batch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader

from lightning_bn import (
    ActivationStatsMonitor,
    BatchNormRecalibration,
    BatchNormSync,
    CompareAverages,
    ConvertBatchNorm,
    ModeCheck,
    Window,
)
from lightning_bn.discovery import user_name

SHARDS_ON_A_CPU = hasattr(torch.cpu.Stream, "record_event")
needs_sharding_on_a_cpu = pytest.mark.skipif(
    not SHARDS_ON_A_CPU, reason="fully_shard of torch 2.6 records events of streams, which a CPU's have not"
)

STEPS = 6
DATA = torch.randn(64, 4, generator=torch.Generator().manual_seed(3)).sort(0).values


def network() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
    return nn.Sequential(hidden, nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Tanh())


def sharded(model: nn.Module, mesh: Any = None) -> nn.Module:
    """A block for itself and the rest around it."""
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Module(pl.LightningModule):
    """Calls its network from training_step; batches are those of the rank and the step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def configure_model(self) -> None:
        mesh = self.device_mesh
        self.replica = self.global_rank
        if mesh is not None:
            self.replica = mesh["data_parallel"].get_local_rank()
            if not hasattr(self.net, "unshard"):
                sharded(self.net, mesh["data_parallel"])

    def forward(self, batch: Tensor) -> Tensor:
        return self.net(batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(own_batch(self.replica, batch_idx)).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.net(DATA).square().mean(), sync_dist=True)

    def on_train_end(self) -> None:  # behind the callbacks', and where every strategy still has the parameters
        self.state = whole(self.trainer.strategy.model, self.net)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fsdp2(tensor_parallel: int = 1) -> Strategy:
    return ModelParallelStrategy(data_parallel_size=2 // tensor_parallel, tensor_parallel_size=tensor_parallel)


def fit(folder: Path, *callbacks: pl.Callback, strategy: Strategy, **options: Any) -> dict[str, Any]:
    runner = trainer(
        *callbacks,
        devices=2,
        strategy=strategy,
        default_root_dir=folder,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )
    module = Module()
    loader = DataLoader(torch.zeros(STEPS), batch_size=None)
    runner.fit(module, loader, DataLoader(torch.zeros(1), batch_size=None))
    return {"state": module.state}


def whole(wrapper: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The whole state of `model`, which `wrapper` may shard."""
    fsdp1 = isinstance(wrapper, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(wrapper, writeback=False) if fsdp1 else nullcontext():
        state = {user_name(key): value for key, value in model.state_dict().items()}
        return {k: v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for k, v in state.items()}


CALLBACKS: dict[str, Callable[[], list[pl.Callback]]] = {
    "monitor": lambda: [ActivationStatsMonitor(every_n_steps=2)],
    "check": lambda: [ModeCheck(action="raise"), BatchNormSync(statistics_only=True)],
    "recalibration": lambda: [BatchNormRecalibration(forward=on_own_batch)],
    "before validation": lambda: [BatchNormRecalibration(when="validation", forward=on_own_batch)],
    "comparison": lambda: [CompareAverages({"window": Window(3)})],
    "conversion": lambda: [ConvertBatchNorm(Window(3)), BatchNormSync(statistics_only=True)],
}


def on_own_batch(module: Module, batch: Tensor) -> None:
    on_own_batch.step = getattr(on_own_batch, "step", -1) + 1
    module.net(own_batch(module.replica, on_own_batch.step % STEPS))


def alone(batches: list[list[Tensor]], merge: bool) -> dict[str, Tensor]:
    """Train one process on the batches of all ranks: as one batch, or each by itself, gradients averaged."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in batches:
        optimizer.zero_grad()
        for batch in [torch.cat(step)] if merge else step:
            (model(batch).square().mean() / (1 if merge else len(step))).backward()
        optimizer.step()
    return model.state_dict()


BATCHES = [[own_batch(rank, step) for rank in range(2)] for step in range(STEPS)]


def check_recalibrated(results: list[dict[Any, Any]], name: str) -> None:
    """All ranks ended with the same statistics, of the batches of both under the weights at the end."""
    one, two = (result[name]["state"] for result in results)
    assert all(torch.equal(one[key], two[key]) for key in one if "running" in key)
    rows = torch.cat([batch for step in BATCHES for batch in step]).double()
    seen = rows @ one["0.0.weight"].double().T + one["0.0.bias"].double()
    torch.testing.assert_close(one["0.1.running_mean"].double(), seen.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one["0.1.running_var"].double(), seen.var(0), rtol=1e-5, atol=1e-5)
