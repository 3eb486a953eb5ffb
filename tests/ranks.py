"""What tests with real processes share."""

from __future__ import annotations

import os
import socket


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
