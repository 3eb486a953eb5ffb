"""FullyShardedDataParallel, the first of torch's two, on two real processes: in Lightning's strategy and by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from processes import error_of, own_batch
from recalibration_models import largest_errors, statistics
from sharded_fits import BATCHES, CALLBACKS, DATA, alone, check_recalibrated, fit, network, on_own_batch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lightning_bn import BatchNormRecalibration, BatchNormSync, recalibrate

STEPS = range(4)


def sharded(model: nn.Module) -> FullyShardedDataParallel:
    """Each block for itself and the rest around it."""
    policy = ModuleWrapPolicy({nn.Sequential})
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=cpu, use_orig_params=True)


class OnCPU(FSDPStrategy):
    """Lightning's own refuses CPUs, and lets subclasses decide: it passes FSDP no device for one."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return sharded(model)


def train(model: nn.Module, rank: int, steps: range) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        optimizer.zero_grad()
        model(own_batch(rank, step)).square().mean().backward()
        optimizer.step()


def without_a_trainer(rank: int, *, recalibrates: bool) -> dict[str, Any]:
    """Train, recalibrate on five batches here and three there, and train on."""
    model = sharded(network())
    sync = BatchNormSync()
    sync.apply(model)
    train(model, rank, STEPS)
    found: dict[str, Any] = {}
    if recalibrates:
        batches = list(DATA.split(8))[:5] if rank == 0 else list(DATA.split(8))[5:]
        report = recalibrate(model, batches, progress=False)
        found = {"report": report.as_dict(), "recalibrated": statistics(model)}
        report.rollback()
    found["before"] = statistics(model)
    train(model, rank, STEPS)
    sync.revert(model)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return found | {"weights": [parameter.detach().clone() for parameter in model.parameters()]}


def _rank(rank: int, world: int, folder: Path, port: int) -> dict[Any, Any]:
    processes.environment(rank, world, port)
    results: dict[Any, Any] = {"plain": fit(folder, strategy=OnCPU())}
    results["sync"] = fit(folder, BatchNormSync(), strategy=OnCPU())
    results["plugin"] = fit(folder, strategy=OnCPU(), plugins=[BatchNormSync()], sync_batchnorm=True)
    for name, make in CALLBACKS.items():
        callbacks = make()
        results[name] = fit(folder, *callbacks, strategy=OnCPU())
        results[name, "table"] = callbacks[0].table() if name == "monitor" else None
    results["two epochs"] = fit(folder, strategy=OnCPU(), max_epochs=2)
    callback = BatchNormRecalibration(when="validation", forward=on_own_batch)
    results["goes on"] = fit(folder, callback, strategy=OnCPU(), max_epochs=2)
    callback = BatchNormRecalibration(when="validation", monitor="val_loss")
    results["found by itself"] = fit(folder, callback, strategy=OnCPU())
    results["checkpoints"] = error_of(
        lambda: fit(folder, BatchNormRecalibration(checkpoints=["best"]), ModelCheckpoint(folder), strategy=OnCPU())
    )
    results["alone"] = without_a_trainer(rank, recalibrates=False)
    results["recalibrated"] = without_a_trainer(rank, recalibrates=True)
    results["exact"] = error_of(lambda: recalibrate(sharded(network()), [DATA], exact=True, progress=False))
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return processes.results(_rank, 2, tmp_path_factory.mktemp("ranks"), processes.free_port())


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.endswith(("weight", "bias"))}


@pytest.mark.parametrize("form", ["sync", "plugin"])
def test_synchronised_is_one_process_on_the_whole_batch(results: list[dict[Any, Any]], form: str) -> None:
    """Trainer(callbacks=[BatchNormSync()]) and Trainer(plugins=[BatchNormSync()], sync_batchnorm=True)."""
    for result in results:
        assert set(result[form]["state"]) == set(network().state_dict())
        for key, value in alone(BATCHES, True).items():
            torch.testing.assert_close(result[form]["state"][key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*CALLBACKS, "goes on"])
def test_each_callback_changes_no_weight(results: list[dict[Any, Any]], name: str) -> None:
    """To the bit; also where training goes on after a recalibration, which ran the model between two steps."""
    for result in results:
        expected = weights(result["two epochs" if name == "goes on" else "plain"]["state"])
        for key, value in expected.items():
            assert torch.equal(result[name]["state"][key], value), key


def test_the_monitor_names_layers_as_the_user_does(results: list[dict[Any, Any]]) -> None:
    """Without the wrappers' part of the path; the same rows on both ranks."""
    table = results[0]["monitor", "table"]
    assert repr(table) == repr(results[1]["monitor", "table"])  # NaN, which is not equal to itself, among it
    assert {"net.0.1", "net.2"} <= {row["layer"] for row in table}
    assert not any("_fsdp" in row["layer"] for row in table)


@pytest.mark.parametrize("name", ["recalibration", "before validation"])
def test_recalibration_in_a_fit(results: list[dict[Any, Any]], name: str) -> None:
    """All ranks end with the same statistics, of the batches of both under the weights at the end."""
    check_recalibrated(results, name)


def test_recalibration_without_a_trainer(results: list[dict[Any, Any]]) -> None:
    """Five batches here and three there are eight; the ranks end with the same bits; rollback and what is trained
    afterwards are as if nothing had been."""
    for result in results:
        found = result["recalibrated"]
        assert found["report"]["batches"] == 8
        for name, pair in found["recalibrated"].items():
            assert all(map(torch.equal, pair, results[0]["recalibrated"]["recalibrated"][name]))
        assert max(largest_errors(found["before"], result["alone"]["before"])) == 0
        assert all(map(torch.equal, found["weights"], result["alone"]["weights"]))


def test_what_is_refused(results: list[dict[Any, Any]]) -> None:
    """exact=True, and checkpoints= at the start of the fit."""
    for result in results:
        assert result["exact"].startswith("ValueError: recalibrate(exact=True)")
        assert "MisconfigurationException" in result["checkpoints"]
        assert "checkpoints=" in result["checkpoints"]
