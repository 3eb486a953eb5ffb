"""What `docs/distributed.md` says was tried: uneven numbers of batches, double backward, Trainers that fork and
spawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import processes
import pytest
import torch
from fitting import trainer
from processes import error_of
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_bn import BatchNormRecalibration, BatchNormSync


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))


def uneven(rank: int) -> None:
    """Three batches here and two there."""
    model = network()
    BatchNormSync().apply(model)
    parallel = DistributedDataParallel(model)
    with Join([parallel], throw_on_early_termination=True):
        for _ in range(3 - rank):
            parallel(torch.randn(8, 4)).sum().backward()


def penalised(*, only: bool) -> None:
    model = network()
    BatchNormSync(statistics_only=only).apply(model)
    batch = torch.randn(8, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(batch).square().sum(), batch, create_graph=True)
    gradient.square().sum().backward()


def _rank(rank: int, world: int, folder: Path) -> dict[str, str]:
    processes.join_group(rank, world, folder / "store")
    found = {f"penalty, {only}": error_of(lambda only=only: penalised(only=only)) for only in (False, True)}
    found["join"] = error_of(lambda: uneven(rank))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return processes.results(_rank, 2, tmp_path_factory.mktemp("ranks"), seconds=60)


def test_join_ends_all_ranks(results: list[dict[str, str]]) -> None:
    """With throw_on_early_termination=True all raise as soon as one has no batch left."""
    for result in results:
        assert result["join"].startswith("RuntimeError")
        assert "exhausted" in result["join"]


def test_double_backward(results: list[dict[str, str]]) -> None:
    """Torch's error where ranks normalise together, none where they share statistics alone."""
    for result in results:
        assert "once_differentiable" in result["penalty, False"]
        assert result["penalty, True"] == "none"


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, batch: Tensor) -> Tensor:
        return self.net(batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _fit(folder: str, strategy: str) -> None:
    """A process of its own starts the Trainer's: nothing of the tests' is forked, and a bound ends it all."""
    torch.set_num_threads(1)
    recalibration = BatchNormRecalibration()
    module = Module()
    data = DataLoader(list(torch.randn(32, 4) + 5), batch_size=8)
    runner = trainer(recalibration, BatchNormSync(), devices=2, strategy=strategy, default_root_dir=folder)
    runner.fit(module, data)
    rows = module.net[0](torch.stack(list(data.dataset))).detach()
    torch.save((recalibration.report is None, module.net[1].running_mean, rows.mean(0)), f"{folder}/{strategy}.pt")


def _start(rank: int, world: int, folder: str, strategy: str) -> None:
    import multiprocessing

    process: Any = multiprocessing.current_process()
    process._config["daemon"] = False  # a daemon has no children
    _fit(folder, strategy)


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_started_by_the_trainer(tmp_path: Any, strategy: str) -> None:
    """The module that comes back has the recalibrated statistics; the report stays in the processes that made it."""
    processes.spawn(_start, 1, str(tmp_path), strategy, seconds=90)
    no_report, found, expected = torch.load(tmp_path / f"{strategy}.pt")
    assert no_report
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
