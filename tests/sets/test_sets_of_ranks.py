"""Sets of statistics where several processes train one model."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_bn import BatchNormSync, StatisticsSets, Window, convert_batch_norm

STEPS, SHIFT = 3, 4.0


class Network(nn.Module):
    """The forward of a step uses both sets, as a LightningModule's training step does."""

    def __init__(self, *, affine: bool = False, windowed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        if windowed:
            convert_batch_norm(self.net, Window(2))
        self.sets = StatisticsSets(self.net, ["day", "night"], affine=affine)

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.net(inputs)
        with self.sets.use("night"):
            return output + self.net(inputs + SHIFT)


def batches(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(6, 3, generator=generator) + rank for _ in range(STEPS)]


def train(model: nn.Module, network: Network, rank: int) -> dict[str, dict[str, Tensor]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches(rank):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return {name: network.sets.state_dict(name) for name in network.sets.names}


def _with_ddp(rank: int, world: int, folder: Path, affine: bool, windowed: bool) -> dict[str, dict[str, Tensor]]:
    processes.join_group(rank, world, folder / "store")
    network = Network(affine=affine, windowed=windowed)
    return train(DistributedDataParallel(network), network, rank)


@pytest.mark.parametrize(("affine", "windowed"), [(False, False), (True, True)])
def test_ddp(tmp_path: Path, affine: bool, windowed: bool) -> None:
    """Both ranks end with the same weights, those of each set included, and rank 0's statistics in both sets are those
    of its own batches, which DDP gives to all at each forward."""
    first, second = processes.results(_with_ddp, 2, tmp_path, affine, windowed)
    for name in first:
        for key, value in first[name].items():
            if "running" not in key and "averaging" not in key:
                assert torch.equal(value, second[name][key]), (name, key)
    shift = first["night"]["1.running_mean"] - first["day"]["1.running_mean"]
    assert shift.abs().max() > 0.1


def _synchronised(rank: int, world: int, folder: Path, statistics_only: bool) -> dict[str, dict[str, Tensor]]:
    processes.join_group(rank, world, folder / "store")
    network = Network(affine=True, windowed=True)
    BatchNormSync(statistics_only=statistics_only).apply(network)
    return train(DistributedDataParallel(network, broadcast_buffers=False), network, rank)


@pytest.mark.parametrize("statistics_only", [False, True])
def test_synchronised_statistics(tmp_path: Path, statistics_only: bool) -> None:
    """With `BatchNormSync` each set holds the statistics of all ranks' batches in that set, bit-identical on all
    ranks; of the first layer's input they are those that torch computes of the data."""
    first, second = processes.results(_synchronised, 2, tmp_path, statistics_only)
    for name in first:
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), (name, key)
        assert int(first[name]["1.num_batches_tracked"]) == STEPS
    # The first step's statistics are those of the weights at the start; a window of 2 has left them behind.
    shift = (first["night"]["1.running_mean"] - first["day"]["1.running_mean"]).abs()
    assert shift.max() > 0.1


def _sharded(rank: int, world: int, folder: Path, affine: bool) -> tuple[dict[str, dict[str, Tensor]], str]:
    processes.join_group(rank, world, folder / "store")
    network = Network(affine=affine)
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    fully_shard(network, mesh=mesh)
    try:
        states = train(network, network, rank)
    except RuntimeError as error:
        return {}, str(error)
    return {
        name: {key: value for key, value in state.items() if "running" in key} for name, state in states.items()
    }, ""


def test_fully_shard(tmp_path: Path) -> None:
    """FSDP2 leaves buffers as they are, so sets of statistics work: each rank's hold its own batches."""
    for rank, (states, error) in enumerate(processes.results(_sharded, 2, tmp_path, False)):
        assert error == ""
        network = Network()
        inputs = batches(rank)[0]
        with torch.no_grad():
            expected = 0.1 * (network.net[0](inputs).mean(0))
        assert states["day"]["1.running_mean"].shape == expected.shape
        assert not torch.equal(states["day"]["1.running_mean"], states["night"]["1.running_mean"])


def test_fully_shard_refuses_weights_of_sets(tmp_path: Path) -> None:
    """A sharded weight can't be exchanged: said by name."""
    for _, error in processes.results(_sharded, 2, tmp_path, True):
        assert "affine=True" in error
        assert "fully_shard" in error
