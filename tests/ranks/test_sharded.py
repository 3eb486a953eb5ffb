"""Sharded models in real Trainers over two real processes: what `docs/distributed.md` says of each part of the
package."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import error_of, own_batch
from recalibration_models import largest_errors, statistics
from sharded_fits import (
    BATCHES,
    CALLBACKS,
    DATA,
    alone,
    check_recalibrated,
    fit,
    fsdp2,
    needs_sharding_on_a_cpu,
    network,
    on_own_batch,
    sharded,
    whole,
)
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module

from lightning_bn import BatchNormRecalibration, BatchNormSync, Window, convert_batch_norm, recalibrate

pytestmark = needs_sharding_on_a_cpu


def parts(rank: int, sizes: tuple[int, int]) -> list[Tensor]:
    """The first sizes[0] batches of the data for rank 0, the next sizes[1] for rank 1."""
    return list(DATA[: 8 * sum(sizes)].split(8))[sizes[0] * rank : sizes[0] + sizes[1] * rank]


def recalibrated(rank: int, sizes: tuple[int, int], **options: Any) -> dict[str, Any]:
    model = sharded(network())
    report = recalibrate(model, parts(rank, sizes), progress=False, **options)
    return {"statistics": statistics(model), "report": report.as_dict()}


def fails_to_load(rank: int) -> str:
    def batches() -> Iterator[Tensor]:
        yield DATA[:8]
        if rank == 1:
            raise OSError("disk full")
        yield DATA[8:16]

    return error_of(lambda: recalibrate(sharded(network()), batches(), progress=False))


def saved_and_loaded(rank: int, folder: Path) -> dict[str, Any]:
    """Train apart, recalibrate, save and load a distributed checkpoint; the layers' whole state."""
    model = convert_batch_norm(network(), Window(3))
    sharded(model)
    for step in range(4):
        model(own_batch(rank, step))
    report = recalibrate(model, [DATA], progress=False)
    before = whole(model, model)
    dcp.save(model.state_dict(), checkpoint_id=f"{folder}/dcp")
    loaded = convert_batch_norm(network(), Window(3))
    state = sharded(loaded).state_dict()
    dcp.load(state, checkpoint_id=f"{folder}/dcp")
    loaded.load_state_dict(state)
    report.rollback()
    return {"before": before, "loaded": whole(loaded, loaded), "undone": whole(model, model)}


def _rank(rank: int, world: int, folder: Path, port: int) -> dict[Any, Any]:
    processes.environment(rank, world, port)
    results: dict[str, Any] = {"plain": fit(folder, strategy=fsdp2())}
    results["sync"] = fit(folder, BatchNormSync(), strategy=fsdp2())
    results["statistics only"] = fit(folder, BatchNormSync(statistics_only=True), strategy=fsdp2())
    results["replicas"] = fit(folder, BatchNormSync(), BatchNormRecalibration(forward=on_own_batch), strategy=fsdp2(2))
    for name, make in CALLBACKS.items():
        callbacks = make()
        results[name] = fit(folder, *callbacks, strategy=fsdp2())
        results[name, "refused"] = error_of(
            lambda c=make: fit(folder, c()[0], plugins=[BatchNormSync()], strategy=fsdp2())
        )
        results[name, "table"] = callbacks[0].table() if name == "monitor" else None
    results["checkpoints"] = error_of(
        lambda: fit(folder, BatchNormRecalibration(checkpoints=["best"]), ModelCheckpoint(folder), strategy=fsdp2())
    )
    for sizes in ((5, 3), (4, 0)):
        results["recalibrated", sizes] = recalibrated(rank, sizes)
    results["tolerance"] = recalibrated(rank, (8, 0), tolerance=100.0)
    results["exact"] = error_of(lambda: recalibrate(sharded(network()), [DATA], exact=True, progress=False))
    results["fails to load"] = fails_to_load(rank)
    results["dcp"] = saved_and_loaded(rank, folder)
    everywhere = distribute_module(network(), init_device_mesh("cpu", (world,)))
    results["DTensor"] = [
        error_of(lambda: recalibrate(everywhere, [DATA], progress=False)),
        error_of(lambda: BatchNormSync().apply(everywhere)),
        error_of(lambda: convert_batch_norm(everywhere, Window(3))),
    ]
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return processes.results(_rank, 2, tmp_path_factory.mktemp("ranks"), processes.free_port())


def test_synchronised_is_one_process_on_the_whole_batch(results: list[dict[Any, Any]]) -> None:
    """Trainer(strategy=ModelParallelStrategy(), callbacks=[BatchNormSync()]): weights and statistics, to 1e-5."""
    for result in results:
        for key, value in alone(BATCHES, True).items():
            torch.testing.assert_close(result["sync"]["state"][key], value, rtol=1e-5, atol=1e-5)


def test_statistics_only_changes_no_weight(results: list[dict[Any, Any]]) -> None:
    """Weights are those without the callback and of one process that averages gradients; the first layer's statistics
    are of the batches of both, which without it they are not, and both ranks have the same."""
    expected, first = alone(BATCHES, False), network()
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    mean = torch.zeros(6, dtype=torch.float64)
    for step in BATCHES:
        mean = 0.9 * mean + 0.1 * first[0][0](torch.cat(step)).detach().double().mean(0)
        optimizer.zero_grad()
        for batch in step:
            (first(batch).square().mean() / 2).backward()
        optimizer.step()
    for result in results:
        for key in ("0.0.weight", "1.weight", "2.bias"):
            assert torch.equal(result["statistics only"]["state"][key], result["plain"]["state"][key])
            torch.testing.assert_close(result["plain"]["state"][key], expected[key], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            result["statistics only"]["state"]["0.1.running_mean"].double(), mean, rtol=1e-5, atol=1e-5
        )
    one, two = (result["statistics only"]["state"] for result in results)
    assert all(torch.equal(one[key], two[key]) for key in one)
    one, two = (result["plain"]["state"] for result in results)
    assert not torch.equal(one["0.1.running_mean"], two["0.1.running_mean"])


def test_tensor_parallel_replicas_are_counted_once(results: list[dict[Any, Any]]) -> None:
    """Two ranks that see the same batch are one process: with their batch twice, the unbiased variance would be
    smaller."""
    expected = network()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for step in BATCHES:
        optimizer.zero_grad()
        expected(step[0]).square().mean().backward()
        optimizer.step()
    recalibrate(expected, [step[0] for step in BATCHES], progress=False)
    for result in results:
        for key, value in expected.state_dict().items():
            torch.testing.assert_close(result["replicas"]["state"][key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CALLBACKS)
def test_each_callback_in_a_sharded_fit(results: list[dict[Any, Any]], name: str) -> None:
    """It runs, and the weights are those without it to the bit."""
    for result in results:
        for key, value in result["plain"]["state"].items():
            if key.endswith(("weight", "bias")):
                assert torch.equal(result[name]["state"][key], value)


@pytest.mark.parametrize("name", CALLBACKS)
def test_each_callback_tells_of_a_plugin_that_nobody_applies(results: list[dict[Any, Any]], name: str) -> None:
    """The fit stops before the first step, and the error shows the form that works."""
    for result in results:
        assert result[name, "refused"].startswith("MisconfigurationException")
        assert "Trainer(callbacks=[BatchNormSync(...)])" in result[name, "refused"]


def test_the_monitor_sees_whole_parameters(results: list[dict[Any, Any]]) -> None:
    """The range of the affine weights is that of all ranks' parts, as in the model at the end of the fit."""
    table = results[0]["monitor", "table"]
    assert repr(table) == repr(results[1]["monitor", "table"])  # NaN is not equal to itself
    last = [row for row in table if row["layer"] == "net.0.1"][-1]
    weight = results[0]["monitor"]["state"]["0.1.weight"]
    assert last["stage"] == "val"
    assert (last["weight_min"], last["weight_max"]) == (weight.min().item(), weight.max().item())


@pytest.mark.parametrize("name", ["recalibration", "before validation"])
def test_recalibration_of_a_sharded_model(results: list[dict[Any, Any]], name: str) -> None:
    """All ranks end with the same statistics, of the batches of both under the weights at the end."""
    check_recalibrated(results, name)


def test_recalibrated_copies_of_checkpoints_are_refused_at_the_start(results: list[dict[Any, Any]]) -> None:
    """Not after the whole fit."""
    for result in results:
        assert "MisconfigurationException" in result["checkpoints"]
        assert "checkpoints=" in result["checkpoints"]
        assert "ModelParallelStrategy" in result["checkpoints"]


@pytest.mark.parametrize("sizes", [(5, 3), (4, 0)])
def test_unequal_numbers_of_batches(results: list[dict[Any, Any]], sizes: tuple[int, int]) -> None:
    """A rank that has run out, or never had any, runs along uncounted: figures are those of one process with all
    batches."""
    model = network()
    report = recalibrate(model, parts(0, sizes) + parts(1, sizes), progress=False).as_dict()
    for result in results:
        found = result["recalibrated", sizes]
        assert max(largest_errors(found["statistics"], statistics(model))) < 1e-5
        assert [found["report"][key] for key in ("batches", "samples")] == [report["batches"], report["samples"]]


def test_ranks_that_stop_apart(results: list[dict[Any, Any]]) -> None:
    """Rank 0 stops at once by its tolerance, rank 1 has nothing; neither waits for the other."""
    for result in results:
        assert result["tolerance"]["report"]["batches"] == 8
        assert all(math.isfinite(layer["standard_error"]) for layer in result["tolerance"]["report"]["layers"])


def test_what_is_refused_by_name(results: list[dict[Any, Any]]) -> None:
    """exact, with the reason; batch norms made of DTensors, with the layer; batches that fail, on both ranks."""
    for result in results:
        assert result["exact"].startswith("ValueError: recalibrate(exact=True)")
        for error in result["DTensor"]:
            assert error.startswith("TypeError")
            assert "0.1 (BatchNorm1d)" in error
            assert "DTensor" in error
    assert "rank 1: OSError: disk full" in results[0]["fails to load"]
    assert results[1]["fails to load"] == "OSError: disk full"


def test_a_distributed_checkpoint_has_one_history(results: list[dict[Any, Any]]) -> None:
    """After a recalibration the ranks agree on the history too, the first rank's, so that it matters not which rank
    each tensor is saved from; rollback gives each rank its own again."""
    one, two = (result["dcp"] for result in results)
    assert any("averaging" in key for key in one["before"])
    for key, value in one["before"].items():
        assert torch.equal(two["before"][key], value), key
        assert torch.equal(one["loaded"][key], value), key
    model = convert_batch_norm(network(), Window(3))
    for step in range(4):
        model(own_batch(0, step))
    own = model.state_dict()["0.1.averaging.rows"]
    torch.testing.assert_close(one["before"]["0.1.averaging.rows"], own, rtol=1e-5, atol=1e-6)
    assert torch.equal(one["undone"]["0.1.averaging.rows"], one["before"]["0.1.averaging.rows"])
    assert not torch.allclose(two["undone"]["0.1.averaging.rows"], own, rtol=0.01)
