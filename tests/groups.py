"""What four real processes do in groups, all together, with other arguments on one of them, and in other numbers than
before."""

from __future__ import annotations

import copy
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import processes
import torch
import torch.distributed as dist
from fitting import trainer
from recalibration_models import mlp, statistics
from sharded_fits import SHARDS_ON_A_CPU
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_bn import (
    ActivationStatsMonitor,
    Averaging,
    BatchNormRecalibration,
    BatchNormSync,
    Cumulative,
    Exponential,
    Window,
    convert_batch_norm,
    recalibrate,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from communication import sent

WORLD = 4
AVERAGES: dict[str, Averaging | None] = {
    "torch": None,
    "Exponential": Exponential(0.3),
    "debiased": Exponential(0.3, debias=True),
    "pooled Exponential": Exponential(0.3, pooled=True),
    "Window": Window(3),
    "pooled Window": Window(3, pooled=True),
    "Cumulative": Cumulative(),
    "pooled Cumulative": Cumulative(pooled=True),
}
NAMES = [[0, 1], [2, 3]]  # the groups, by their ranks


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(2)


def data(rank: int, step: int = 0, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(size + rank, 10, generator=generator) * (1 + rank) + rank


def error_of(call: Callable[[], object]) -> tuple[str, float]:
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "none", time.monotonic() - start


def recalibrated(rank: int, group: Any, exact: bool) -> dict[str, Any]:
    model = network()
    recalibrate(model, [data(rank), data(rank, 1)], exact=exact, progress=False, process_group=group)
    return statistics(model)


class Module(pl.LightningModule):
    """Stands still, so that all ranks keep the same weights without telling each other."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fitted(rank: int, group: Any, folder: Path) -> dict[str, Any]:
    """A Trainer for each process, which knows of no other: the callbacks' group alone tells who shares a model."""
    monitor = ActivationStatsMonitor(every_n_steps=1, verbose=False, process_group=group)
    recalibration = BatchNormRecalibration(forward=lambda module, batch: module.net(batch), process_group=group)
    module = Module()
    runner = trainer(monitor, recalibration, default_root_dir=folder)
    runner.fit(module, DataLoader([data(rank, step) for step in range(2)], batch_size=None))
    return {"table": monitor.table(), "statistics": statistics(module.net)}


def wrong_on_one(rank: int) -> dict[str, tuple[str, float]]:
    """Each argument is another, or wrong, on rank 2 alone."""
    odd, batches = rank == 2, [data(rank)]
    small = nn.Sequential(nn.BatchNorm1d(10))
    calls: dict[str, Callable[[], object]] = {
        "prior": lambda: recalibrate(network(), batches, prior=-1.0 if odd else 0.0, progress=False),
        "num_batches": lambda: recalibrate(network(), batches, num_batches=2 if odd else 3, progress=False),
        "exact": lambda: recalibrate(network(), batches, exact=odd, progress=False),
        "model": lambda: recalibrate(small if odd else network(), batches, progress=False),
        "no layers": lambda: recalibrate(nn.Linear(1, 1) if odd else network(), batches, progress=False),
        "sync": lambda: BatchNormSync(statistics_only=odd).apply(network()),
        "sync, model": lambda: BatchNormSync().apply(small if odd else network()),
        "group size": lambda: BatchNormSync(group_size=3).apply(network()),
    }
    return {name: error_of(call) for name, call in calls.items()}


def in_pairs(rank: int) -> dict[str, Any]:
    """Train one layer in groups of two, by one object that also serves another."""
    layer, other = convert_batch_norm(nn.BatchNorm1d(10), Window(2)), nn.BatchNorm1d(10)
    sync = BatchNormSync(group_size=2)
    sync.apply(layer), sync.apply(other)
    outputs = [layer(data(rank, step)).detach() for step in range(3)]
    sync.revert(other)
    assert sync.is_applied_to(layer)
    assert not sync.is_applied_to(other)
    outputs.append(layer(data(rank, 3)).detach())
    sync.revert(layer)
    alone = other(data(rank)).detach()
    return {"outputs": outputs, "state": layer.state_dict(), "alone": alone}


def far_away(rank: int) -> dict[str, Tensor]:
    """Data a hundred thousand standard deviations from zero, whose mean also jumps, in float64."""
    layer = nn.BatchNorm1d(2, momentum=1.0, dtype=torch.float64)
    BatchNormSync(statistics_only=True).apply(layer)
    found = []
    for step in range(3):
        layer(distant(rank, step))
        found.append(torch.stack((layer.running_mean, layer.running_var)))
    return {"found": torch.stack(found)}


def distant(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + 10 * step + rank)
    return torch.randn(5, 2, generator=generator, dtype=torch.float64) + 1e5 + 100 * step


def awaited(rank: int) -> dict[str, Any]:
    """Look at a layer after each forward in another way, on one rank before the others do, or alone."""
    layer = convert_batch_norm(nn.BatchNorm1d(10), Window(2))
    model = nn.Sequential(layer)
    BatchNormSync(statistics_only=True).apply(model)
    own = layer.__dict__["_buffers"]
    found: dict[str, Any] = {}
    looks: dict[str, Callable[[], Any]] = {
        "attribute": lambda: layer.running_mean,
        "count": lambda: layer.num_batches_tracked,
        "state_dict": lambda: model.state_dict()["0.running_mean"],
        "buffers": lambda: dict(model.named_buffers())["0.running_mean"],
        "deepcopy": lambda: copy.deepcopy(layer).running_mean,
        "pickle": lambda: pickle.loads(pickle.dumps(layer.state_dict()))["running_mean"],
        "move": lambda: layer.double().float().running_mean,
        "evaluation": lambda: (model.eval()(data(0)), model.train())[0].detach(),
    }
    for step, (name, look) in enumerate(looks.items()):
        model(data(rank, step)).square().sum().backward()
        waited = layer.__dict__["_buffers"] is own
        if rank == 0:  # does not wait for the others to look too
            look()
            dist.barrier()
        else:
            dist.barrier()
        found[name] = waited, look().clone(), layer.__dict__["_buffers"] is own
        own = layer.__dict__["_buffers"]  # `.double()` keeps it, a load may not
    model(data(rank, 99))
    if rank == 0:
        layer.running_mean  # noqa: B018  # alone; the others never look
    dist.barrier()
    return found


def one_step(rank: int) -> dict[str, Any]:
    """What a step sends, after the first."""
    model = convert_batch_norm(network(), Window(3))
    BatchNormSync(statistics_only=True).apply(model)

    def step() -> None:
        model(data(rank)).square().sum().backward()
        model[0][1].running_mean  # noqa: B018  # waits

    step()
    return {"sent": sent(step), "channels": [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm1d)]}


def resumed(rank: int, pair: Any) -> dict[str, dict[str, Tensor]]:
    """Train three steps on two ranks, save, and go on with four."""
    found = {}
    for name, averaging in AVERAGES.items():
        for only in (False, True):
            first = convert_batch_norm(nn.BatchNorm1d(10), averaging)
            if rank < 2:
                BatchNormSync(statistics_only=only, process_group=pair).apply(first)
                for step in range(3):
                    first(whole(step).chunk(2)[rank])
            box = [first.state_dict()]
            dist.broadcast_object_list(box, src=0)
            second = convert_batch_norm(nn.BatchNorm1d(10), averaging)
            second.load_state_dict(box[0])
            BatchNormSync(statistics_only=only).apply(second)
            for step in range(3, 6):
                second(whole(step).chunk(4)[rank])
            found[f"{name}, {only}"] = second.state_dict()
    return found


def in_tensor_parallel(rank: int) -> dict[str, Any]:
    """Two pairs; the ranks of one divide two layers between them and see the same batches."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found: dict[str, Any] = {}
    for name in ("tp", "tp, fully_shard")[: 1 + SHARDS_ON_A_CPU]:
        model = network()
        parallelize_module(model[0][0], mesh["tp"], ColwiseParallel(output_layouts=Replicate()))
        if "fully_shard" in name:
            fully_shard(model, mesh=mesh["dp"])
        batches = [data(rank // 2, step) for step in range(2)]
        found[name] = [
            error_of(lambda m=model, b=batches: recalibrate(m, b, progress=False)),
            error_of(lambda m=model: BatchNormSync().apply(m)),
        ]
        report = recalibrate(model, batches, progress=False, process_group=mesh["dp"].get_group())
        found[name, "statistics"], found[name, "batches"] = statistics(model), report.batches
    return found


def whole(step: int) -> Tensor:
    return torch.cat([data(rank, step, 8 - rank) for rank in range(4)])


def each_rank(rank: int, world: int, folder: Path) -> dict[str, Any]:
    processes.join_group(rank, world, folder / "store")
    groups = [dist.new_group(members) for members in NAMES]
    own, other = groups[rank // 2], groups[1 - rank // 2]
    results: dict[str, Any] = {f"recalibrated, {exact}": recalibrated(rank, own, exact) for exact in (False, True)}
    results["fitted"] = fitted(rank, own, folder)
    if rank < 2:
        results["one group alone"] = recalibrated(rank, own, False)
        results["one group's fit alone"] = fitted(rank, own, folder)
    results["outside"] = [
        error_of(lambda: recalibrate(network(), [data(rank)], process_group=other, progress=False)),
        error_of(lambda: BatchNormSync(process_group=other).apply(network())),
    ]
    results["wrong on one"] = wrong_on_one(rank)
    results["pairs"] = in_pairs(rank)
    results["far away"] = far_away(rank)
    results["awaited"] = awaited(rank)
    results["one step"] = one_step(rank)
    results["tensor parallel"] = in_tensor_parallel(rank)
    results["resumed"] = resumed(rank, own)
    return results
