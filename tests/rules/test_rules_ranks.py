"""What the rules say in two real processes: of honest training nothing, of statistics of each rank's own the same on
both, and of docs/rules.md's programs what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fitting import quiet, trainer
from lightning.pytorch.strategies import DDPStrategy
from processes import environment, free_port, results
from small_data import BATCHES, data
from small_models import Module
from test_rules_docs import PRELUDE, SECTIONS, codes

from lightning_bn import ModeCheck


def found(folder: Path, strategy: DDPStrategy, batches: int, epochs: int) -> list[tuple[str, str]]:
    """Fit, and return the level and the code of each finding."""
    check = ModeCheck(action="log")
    with quiet():
        runner = trainer(check, strategy=strategy, devices=2, max_epochs=epochs, default_root_dir=folder)
        runner.fit(Module(), data(batches=batches), data(batches=4))
    return [(finding.level, finding.code) for finding in check.findings]


def _rank(rank: int, world: int, folder: Path, port: int) -> dict[str, Any]:
    environment(rank, world, port)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(PRELUDE, namespace)
    return {
        "documented": [codes(namespace, block) for block in SECTIONS["BN306"]],
        "honest": found(folder, DDPStrategy(), 2 * BATCHES, epochs=2),
        "own": found(folder, DDPStrategy(broadcast_buffers=False), 12, epochs=1),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found in all fits, one after the other in one group."""
    return results(_rank, 2, tmp_path_factory.mktemp("ranks"), free_port())


def test_programs_of_two_processes(ranks: list[dict[str, Any]]) -> None:
    """Each rank hears of the first program of BN306 and not of the second."""
    for rank in ranks:
        wrong, mended = rank["documented"]
        assert "BN306" in wrong
        assert "BN306" not in mended


def test_honest_training(ranks: list[dict[str, Any]]) -> None:
    """DDP copies every buffer at each forward, which moves versions and no statistics."""
    for rank in ranks:
        assert "BN304" in {code for _, code in rank["honest"]}
        assert {level for level, _ in rank["honest"]} == {"info"}


def test_ranks_with_statistics_of_their_own(ranks: list[dict[str, Any]]) -> None:
    """DDP with broadcast_buffers=False: every rank judges another network, and hears so."""
    for rank in ranks:
        assert "BN306" in {code for _, code in rank["own"]}
