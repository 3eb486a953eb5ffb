"""What all tests share: the devices that are there, and a fixed seed."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import other_torchvision  # noqa: F401  # before others import torchvision
import pytest
import torch
from limits import SCALE, limit

from lightning_bn.error_boundary import RERAISE

# Tests may use what the examples share.
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

# An error inside of an observer is hidden from users, and never from these tests, nor from the processes they start.
os.environ[RERAISE] = "1"

# Each Trainer asks which packages bring callbacks, which is most of what making one takes. None is installed meanwhile.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)

# A forked process ends as it is asked to, also one that waits for a lock and runs no handler of Python's.
os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))

DEVICES = ["cpu"]
if torch.accelerator.is_available():
    DEVICES.append(torch.accelerator.current_accelerator().type)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device on this machine in turn."""
    return torch.device(request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Multiply the limit of each test by what `limits.SCALE` says."""
    for item in items if SCALE != 1 else ():
        marker = item.get_closest_marker("timeout")
        seconds = float(marker.args[0] if marker else config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(limit(seconds)), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Let a Ctrl-C that a test sends itself, and that nobody takes, fail that test: pytest would end all."""
    try:
        return (yield)
    except KeyboardInterrupt:
        if "interrupts_are_heard" in pyfuncitem.fixturenames:
            pytest.fail("an interrupt that this test sent itself came where none was expected")
        raise


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """What earlier tests compiled counts towards the limit of recompilations."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer without a logger leaves its journal in the current directory."""
    monkeypatch.chdir(tmp_path_factory.mktemp("current"))


@pytest.fixture(autouse=True)
def _a_termination_fails_one_test() -> Iterator[None]:
    """A SIGTERM that reaches this process, from a launcher that ends its group, is one test's failure, and not the end
    of all."""

    def fail(number: int, frame: object) -> None:
        pytest.fail("a SIGTERM reached the process of the tests")

    before = signal.signal(signal.SIGTERM, fail)
    yield
    signal.signal(signal.SIGTERM, before)
