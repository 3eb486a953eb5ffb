"""What the rules say in two real processes: of honest training nothing, of statistics of each rank's own the same on
both, and of the programs of docs/rules what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import quiet, trainer
from lightning.pytorch.strategies import DDPStrategy
from processes import environment, free_port, results
from small_data import BATCHES, data
from small_models import Module
from test_rules_docs import PRELUDE, SECTIONS, codes
from test_rules_mismatch import Swaps
from torch.utils.data import DataLoader, IterableDataset

from lightning_bn import BatchNormSync, ModeCheck
from lightning_bn.error_boundary import RERAISE
from lightning_bn.rules.inspection import Inspection


def found(folder: Path, strategy: DDPStrategy, batches: int, epochs: int) -> list[tuple[str, str]]:
    """Fit, and return the level and the code of each finding."""
    check = ModeCheck(action="log")
    with quiet():
        runner = trainer(check, strategy=strategy, devices=2, max_epochs=epochs, default_root_dir=folder)
        runner.fit(Module(), data(batches=batches), data(batches=4))
    return [(finding.level, finding.code) for finding in check.findings]


class Stream(IterableDataset[Any]):
    """As many batches as it is told, of a length that nobody knows before."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(data(batches=self.batches))


class UnevenSwaps(Swaps):
    """Exchanges its weights for validation, which ends on the second rank before its statistics are judged."""

    def val_dataloader(self) -> Any:
        return DataLoader(Stream(8 if self.trainer.global_rank == 0 else 2), batch_size=None)


def exchanged(
    folder: Path, place: str, *callbacks: Any, kind: type[Swaps] = Swaps, fails: int | None = None
) -> list[tuple[str, str, str]]:
    """Fit a module that exchanges its weights, and return level, code and event of what is said of the statistics;
    on the rank `fails` the callback fails in the first training batch."""
    check = ModeCheck(action="log")
    module = kind()
    module.place = place
    with quiet(), pytest.MonkeyPatch.context() as patch:
        runner = trainer(check, *callbacks, strategy=DDPStrategy(), devices=2, default_root_dir=folder)
        if fails == runner.global_rank:
            patch.delenv(RERAISE, raising=False)
            patch.setattr(Inspection, "trace", lambda *_, **__: 1 / 0)
        torch.manual_seed(0)
        validation = {} if kind is UnevenSwaps else {"val_dataloaders": data(batches=8)}
        runner.fit(module, data(batches=80), **validation)
    kinds = ("BN207", "BN208")
    return [(each.level, each.code, each.seen) for each in check.findings if each.code in kinds]


def _rank(rank: int, world: int, folder: Path, port: int) -> dict[str, Any]:
    environment(rank, world, port)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(PRELUDE, namespace)
    return {
        "documented": [codes(namespace, block) for block in SECTIONS["BN306"]],
        "honest": found(folder, DDPStrategy(), 2 * BATCHES, epochs=2),
        "exchanged": {place: exchanged(folder, place) for place in ("start", "step", "train_end")},
        "synchronised": exchanged(folder, "start", BatchNormSync()),
        "uneven": exchanged(folder, "start", kind=UnevenSwaps),
        "failed": exchanged(folder, "start", fails=1),
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


@pytest.mark.parametrize("place", ["start", "step", "train_end"])
def test_exchanged_weights(ranks: list[dict[str, Any]], place: str) -> None:
    """Weights without their statistics, put in before a validation, inside of its step or after training: both ranks
    run a training batch again, and hear the same of it, as one process does."""
    # Before the exchange at the end the statistics may lag behind the weights, which is another finding.
    told = [[entry for entry in rank["exchanged"][place] if entry[1] == "BN207"] for rank in ranks]
    ((level, _, seen),), ((other, *_),) = told
    assert level == other != "info"
    assert "even the training images" in seen


def test_exchanged_weights_of_synchronised_layers(ranks: list[dict[str, Any]]) -> None:
    """The replay normalises with the batches of all ranks too, which meet in it."""
    for rank in ranks:
        assert [code for level, code, _ in rank["synchronised"] if level != "info"] == ["BN207"]


@pytest.mark.parametrize("fit", ["uneven", "failed"])
def test_no_rank_waits(ranks: list[dict[str, Any]], fit: str) -> None:
    """Where a rank has too few batches to judge, or the callback has failed on it, none runs a training batch again."""
    one, two = (rank[fit] for rank in ranks)
    assert two == []
    ((level, code, seen),) = one
    assert (level, code) == ("info", "BN208")
    assert "not every rank saw a misfit" in seen
