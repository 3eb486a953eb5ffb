"""A rank that dies, or hangs: the others end with an error within the group's timeout, and their statistics are the old
ones."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from limits import limit
from torch import Tensor, nn

from lightning_bn import BatchNormSync, Window, convert_batch_norm, recalibrate

TIMEOUT = 3  # of the group, in seconds
SLACK = limit(3)  # a busy machine's
End = Callable[[], None]


def wait_for(*paths: Path) -> None:
    while not all(path.exists() for path in paths):
        time.sleep(0.02)


def batch(step: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step)) + step


def recalibration(model: nn.Module, rank: int, end: End, *, exact: bool) -> None:
    """Rank 1 ends in the middle of its data."""

    def batches() -> Iterator[Tensor]:
        for step in range(4):
            if rank == 1 and step == 2:
                end()
            yield batch(step)

    recalibrate(model, batches(), exact=exact, progress=False)


def training(model: nn.Module, rank: int, end: End, *, only: bool) -> None:
    """Rank 1 ends in a forward: before the first layer's turn, or, where ranks meet behind the last one only, between
    layers."""
    sync = BatchNormSync(statistics_only=only)
    sync.apply(model)
    if rank == 1:
        model[2 if only else 0].register_forward_hook(lambda *_: end())
    try:
        model(batch(9))
    finally:
        sync.revert(model)


def backward(model: nn.Module, rank: int, end: End) -> None:
    """Rank 1 ends between its forward and its backward; the statistics are kept apart, as the forward moves them."""
    sync = BatchNormSync()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sync.apply(model)
    try:
        output = model(batch(9))
        if rank == 1:
            end()
        output.sum().backward()
    finally:
        sync.revert(model)
        model.load_state_dict(before)


SCENARIOS: dict[str, Callable[[nn.Module, int, End], None]] = {
    "recalibrate": partial(recalibration, exact=False),
    "recalibrate, exact": partial(recalibration, exact=True),
    "BatchNormSync": partial(training, only=False),
    "BatchNormSync, backward": backward,
    "BatchNormSync, statistics only": partial(training, only=True),
}
WAYS = ["dies", "hangs"]


def _scenario(rank: int, world: int, folder: str, name: str, way: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )
    torch.manual_seed(0)
    model = convert_batch_norm(
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), nn.BatchNorm1d(3)), Window(3)
    )
    for step in range(5):
        model(batch(step))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = [set(module.__dict__) for module in model.modules()]
    dist.barrier()
    start = time.monotonic()
    outcome: dict[str, Any] = {"error": None}

    def end() -> None:
        if way == "hangs":
            wait_for(*(Path(folder, f"{other}.pt") for other in range(world) if other != rank))
        os._exit(0)

    try:
        SCENARIOS[name](model, rank, end)
    except Exception as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
    outcome["seconds"] = time.monotonic() - start
    outcome["unchanged"] = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    outcome["reverted"] = attributes == [set(module.__dict__) for module in model.modules()]
    torch.save(outcome, f"{folder}/{rank}.part")
    Path(folder, f"{rank}.part").rename(f"{folder}/{rank}.pt")


def _rank(rank: int, world: int, folder: str) -> None:
    """Run each scenario in a fork of this process, which has imported all there is and joined no group."""
    torch.set_num_threads(1)
    for name in SCENARIOS:
        for way in WAYS:
            own = Path(folder, f"{name}, {way}")
            own.mkdir(exist_ok=True)
            Path(own, f"{rank} is ready").touch()  # the group's timeout is short for those who wait at the door
            wait_for(*(own / f"{other} is ready" for other in range(world)))
            child = os.fork()
            if child == 0:
                try:
                    _scenario(rank, world, str(own), name, way)
                finally:
                    os._exit(0)  # a member of a broken group can't leave it in order
            os.waitpid(child, 0)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    processes.spawn(_rank, 3, str(folder))
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_others_end_in_time_with_the_old_statistics(outcomes: Path, name: str, way: str) -> None:
    """Both other ranks raise the package's error, which names the call, at once where the connection breaks and at the
    timeout where it does not; nothing is changed."""
    found = {rank: torch.load(outcomes / f"{name}, {way}" / f"{rank}.pt") for rank in (0, 2)}
    assert not (outcomes / f"{name}, {way}" / "1.pt").exists()
    for outcome in found.values():
        assert outcome["error"] == "LostRankError"
        assert outcome["message"].startswith(name.split(", ")[0])
        assert "A rank has died" in outcome["message"]
        assert outcome["unchanged"]
        assert outcome["reverted"]
        assert outcome["seconds"] < TIMEOUT + SLACK
