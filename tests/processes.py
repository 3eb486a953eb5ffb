"""What tests with real processes share."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from limits import limit
from torch import Tensor

# The processes are forks of one that has imported what takes seconds, and has done nothing with it.
IMPORTED = ["lightning.pytorch", "lightning_bn.callbacks.synchronisation", "torch.distributed.fsdp", "pandas", "pytest"]


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def environment(rank: int, world: int, port: int) -> None:
    """Tell Lightning in this process that it is one of `world` processes that somebody else has started."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= address | {"NODE_RANK": "0", "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}


def spawn(function: Callable[..., None], world: int, *arguments: Any, seconds: float = 150) -> None:
    """Run ``function(rank, world, *arguments)`` in `world` processes; an error in one is raised here, and none outlives
    `seconds`."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    # Daemons: what still hangs when the tests end is ended with them, not waited for.
    context = mp.start_processes(
        function, (world, *arguments), nprocs=world, join=False, daemon=True, start_method="forkserver"
    )
    end = time.monotonic() + limit(seconds)
    try:
        while not context.join(timeout=1):
            if time.monotonic() > end:
                raise TimeoutError(f"{function.__name__} in {world} processes took more than {seconds} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def results(function: Callable[..., Any], world: int, folder: Path, *arguments: Any, seconds: float = 150) -> list[Any]:
    """Return what ``function(rank, world, folder, *arguments)`` returned in each of `world` processes; a group that it
    joined is left behind it."""
    spawn(_save, world, folder, function, arguments, seconds=seconds)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _save(rank: int, world: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.save(function(rank, world, folder, *arguments), folder / f"{rank}.pt")
    if dist.is_initialized():
        leave_group()


def join_group(rank: int, world: int, store: Path) -> None:
    """Make this process a member of a gloo group that meets at the file `store`."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)


def leave_group() -> None:
    """Leave the group together: gloo can hang in a member that is left behind with a message on the way."""
    dist.barrier()
    dist.destroy_process_group()


def own_batch(rank: int, step: int) -> Tensor:
    """Return the batch of a rank in a step: eight rows of four numbers, of another mean and spread in each rank."""
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + rank)) * (1 + rank) + rank


def error_of(call: Callable[[], object]) -> str:
    """Return what `call` raises, for a rank that has to go on and say so, or "none"."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"
