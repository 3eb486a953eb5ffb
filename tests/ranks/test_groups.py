"""Four real processes: in groups, all together, with other arguments on one of them, and in other numbers than
before."""

from __future__ import annotations

from typing import Any

import processes
import pytest
import torch
from groups import AVERAGES, NAMES, WORLD, data, distant, each_rank, network, whole
from recalibration_models import largest_errors, statistics
from sharded_fits import needs_sharding_on_a_cpu
from torch import nn

from lightning_bn import Window, convert_batch_norm, recalibrate


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes.results(each_rank, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ["recalibrated, False", "recalibrated, True", "one group alone"])
def test_groups_recalibrate_apart(results: list[dict[str, Any]], name: str) -> None:
    """Each group's statistics are of its own data, not a blend, and one group needs no other."""
    for rank, result in enumerate(results):
        if name in result:
            model = network()
            batches = [data(other, step) for other in NAMES[rank // 2] for step in range(2)]
            recalibrate(model, batches, exact="True" in name, progress=False)
            assert max(largest_errors(result[name], statistics(model))) < 1e-5
    assert sum(name in result for result in results) == (2 if name == "one group alone" else 4)


@pytest.mark.parametrize("name", ["tp", pytest.param("tp, fully_shard", marks=needs_sharding_on_a_cpu)])
def test_tensor_parallel_replicas(results: list[dict[str, Any]], name: str) -> None:
    """Without a Trainer, nobody says which ranks see the same batches: the error shows what to pass, and with it each
    batch is counted once."""
    model = network()
    recalibrate(model, [data(pair, step) for pair in range(2) for step in range(2)], progress=False)
    for result in results:
        found = result["tensor parallel"]
        for (error, seconds), call in zip(found[name], ("recalibrate(", "BatchNormSync.apply("), strict=True):
            assert error.startswith(f"ValueError: {call}")
            assert "('tp',)" in error or "('dp', 'tp')" in error
            assert "process_group=mesh['dp'].get_group()" in error
            assert seconds < 10
        assert found[name, "batches"] == 4
        assert max(largest_errors(found[name, "statistics"], statistics(model))) < 1e-5


@pytest.mark.parametrize("name", ["fitted", "one group's fit alone"])
def test_groups_fit_apart(results: list[dict[str, Any]], name: str) -> None:
    """Two models in two groups of one job, each process with a Trainer of its own: the monitor's rows and the
    recalibrated statistics are of the group's data."""
    for rank, result in enumerate(results):
        if name in result:
            batches = [data(other, step) for other in NAMES[rank // 2] for step in range(2)]
            model = network()
            recalibrate(model, batches, progress=False)
            assert max(largest_errors(result[name]["statistics"], statistics(model))) < 1e-5
            rows = [row for row in result[name]["table"] if row["layer"] == "net.0.2"]
            for step, row in enumerate(rows):
                activations = [network()[0](data(other, step)).detach().double() for other in NAMES[rank // 2]]
                assert row["mean"] == pytest.approx(torch.cat(activations).mean().item())
            assert len(rows) == 2
    assert sum(name in result for result in results) == (2 if name == "one group's fit alone" else 4)


def test_a_rank_outside_of_the_group_is_an_error(results: list[dict[str, Any]]) -> None:
    """At once, and nobody waits."""
    for result in results:
        for error, seconds in result["outside"]:
            assert error.startswith("ValueError")
            assert "process_group does not contain this process" in error
            assert seconds < 5


SAID = {
    "prior": "prior=-1.0",
    "num_batches": "num_batches is 3 on rank 0 and 2 on rank 2",
    "exact": "exact is False on rank 0 and True on rank 2",
    "model": "the number of layers is 2 on rank 0 and 1 on rank 2",  # both are a Sequential
    "no layers": "no batch-norm layer",
    "sync": "statistics_only is False on rank 0 and True on rank 2",
    "sync, model": "the number of batch-norm layers is 2 on rank 0 and 1 on rank 2",
    "group size": "4 ranks can't be divided into groups of 3; one of 2, 4 can be used",
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_wrong_on_one_rank_is_raised_on_all(results: list[dict[str, Any]], name: str) -> None:
    """Within seconds, and says which rank and what."""
    for result in results:
        error, seconds = result["wrong on one"][name]
        assert SAID[name] in error
        assert seconds < 10


def test_normalised_in_groups_with_statistics_of_all(results: list[dict[str, Any]]) -> None:
    """Outputs are those of the pair's batch; the window takes the moments of all four ranks, each batch once."""
    averaged = convert_batch_norm(nn.BatchNorm1d(10), Window(2))
    for step in range(4):
        averaged(torch.cat([data(rank, step) for rank in range(4)]))
        for members in NAMES:
            expected = nn.BatchNorm1d(10)(torch.cat([data(rank, step) for rank in members])).detach()
            found = torch.cat([results[rank]["pairs"]["outputs"][step] for rank in members])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for rank, result in enumerate(results):
        for key, value in averaged.state_dict().items():
            torch.testing.assert_close(result["pairs"]["state"][key], value, rtol=1e-5, atol=1e-5)
        expected = nn.BatchNorm1d(10)(data(rank)).detach()
        torch.testing.assert_close(result["pairs"]["alone"], expected)


def test_statistics_far_from_zero(results: list[dict[str, Any]]) -> None:
    """In the first step, in which no shift is known, and in later ones, in which the mean has jumped by a hundred
    deviations; the same on all ranks to the bit."""
    for step in range(3):
        rows = torch.cat([distant(rank, step) for rank in range(4)])
        mean, var = rows.mean(0), (rows - rows.mean(0)).square().sum(0) / (len(rows) - 1)
        for result in results:
            found = result["far away"]["found"]
            assert torch.equal(found, results[0]["far away"]["found"])
            # What each rank hands in, by torch's own kernel, is good to 1e-11 at this distance from zero.
            torch.testing.assert_close(found[step], torch.stack((mean, var)), rtol=1e-9, atol=0)


def test_whoever_looks_waits(results: list[dict[str, Any]]) -> None:
    """After a forward and its backward the sum is still awaited; a look of any kind shows the batch of all ranks, and
    gives the module its own buffers back."""
    averaged = convert_batch_norm(nn.BatchNorm1d(10), Window(2))
    for step, name in enumerate(results[0]["awaited"]):
        averaged(torch.cat([data(rank, step) for rank in range(4)]))
        expected = {"count": averaged.num_batches_tracked, "evaluation": averaged.eval()(data(0)).detach()}
        averaged.train()
        for result in results:
            waited, found, restored = result["awaited"][name]
            assert not waited
            assert restored
            torch.testing.assert_close(found, expected.get(name, averaged.running_mean), rtol=1e-5, atol=1e-5)


def test_the_message(results: list[dict[str, Any]]) -> None:
    """One all_reduce a step, of ``8 (2 C + L)`` bytes, and nothing else."""
    for result in results:
        channels = result["one step"]["channels"]
        assert result["one step"]["sent"] == {"all_reduce": (1, 8 * (2 * sum(channels) + len(channels)))}


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("name", AVERAGES)
def test_resumed_with_another_number_of_ranks(results: list[dict[str, Any]], name: str, only: bool) -> None:
    """Three steps on two ranks and three on four are six steps of one process on the whole batches."""
    alone = convert_batch_norm(nn.BatchNorm1d(10), AVERAGES[name])
    for step in range(6):
        alone(whole(step))
    for result in results:
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(result["resumed"][f"{name}, {only}"][key], value, rtol=1e-4, atol=1e-5)
