"""Two real processes over gloo: what they see is merged, both end with the same bits, and neither waits for one that
failed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import free_port, leave_group, spawn
from recalibration_models import cnn, everything, full_batch, largest_errors, mlp, statistics
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_bn import recalibrate
from lightning_bn.ranks.collective import RankError

DATA = torch.randn(64, 10, generator=torch.Generator().manual_seed(3)).sort(0).values
# Rank 0 has five batches, rank 1 three, of all sizes.
PARTS = [list(DATA[:37].split(8)), list(DATA[37:].split(9))]


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return mlp(3)


def merged(rank: int, exact: bool, **options: Any) -> dict[str, Any]:
    chosen = model()
    report = recalibrate(chosen, PARTS[rank], exact=exact, progress=True, **options)
    return {"statistics": statistics(chosen), "report": report.as_dict()}


def one_has_none(rank: int, exact: bool) -> dict[str, Any]:
    chosen = model()
    report = recalibrate(chosen, PARTS[0] if rank == 0 else [], exact=exact, progress=False)
    return {"statistics": statistics(chosen), "report": report.as_dict()}


def nobody_has_any(rank: int, exact: bool) -> dict[str, Any]:
    return outcome(model(), [], exact=exact)


def one_fails(rank: int, exact: bool) -> dict[str, Any]:
    def forward(model: nn.Module, batch: Tensor) -> None:
        model[0](batch)
        if rank == 1 and batch is PARTS[1][1]:
            raise KeyError("on rank 1")
        model[1:](model[0](batch))

    return outcome(model(), PARTS[rank], exact=exact, forward=forward)


def one_runs_a_layer_that_the_other_skips(rank: int, exact: bool) -> dict[str, Any]:
    chosen = nn.ModuleList(nn.BatchNorm1d(10) for _ in range(3))
    forward = [lambda m, x: m[2](m[1](m[0](x))), lambda m, x: m[2](m[0](x))][rank]
    report = recalibrate(chosen, PARTS[rank], exact=exact, forward=forward, progress=False)
    return {"statistics": statistics(chosen), "report": report.as_dict()}


def prior_with_other_starts(rank: int, exact: bool) -> dict[str, Any]:
    chosen = model()
    for layer in (chosen[0][1], chosen[1][1]):
        layer.running_mean.fill_(float(rank))
    recalibrate(chosen, PARTS[rank], exact=exact, prior=20, progress=False)
    return {"statistics": statistics(chosen)}


def inside_ddp(rank: int, exact: bool) -> dict[str, Any]:
    chosen = model()
    report = recalibrate(DistributedDataParallel(chosen), PARTS[rank], exact=exact, progress=False)
    return {"statistics": statistics(chosen), "report": report.as_dict()}


def synchronised(rank: int, exact: bool) -> dict[str, Any]:
    chosen = nn.SyncBatchNorm.convert_sync_batchnorm(model())
    report = recalibrate(chosen, PARTS[rank], exact=exact, progress=False)
    return {"statistics": statistics(chosen), "report": report.as_dict()}


def images(rank: int, exact: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    chosen, data = cnn(2), torch.rand(24, 1, 5, 5).split([16, 8])[rank]
    recalibrate(chosen, data.split(3), exact=exact, progress=False)
    return {"statistics": statistics(chosen)}


def outcome(chosen: nn.Module, batches: list[Tensor], **options: Any) -> dict[str, Any]:
    before = everything(chosen)
    try:
        recalibrate(chosen, batches, progress=False, **options)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "unchanged": before == everything(chosen)}
    return {"error": "none"}


SCENARIOS: list[Callable[[int, bool], dict[str, Any]]] = [
    merged,
    one_has_none,
    nobody_has_any,
    one_fails,
    one_runs_a_layer_that_the_other_skips,
    prior_with_other_starts,
    inside_ddp,
    synchronised,
    images,
]


def work(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    found = {(scenario.__name__, exact): scenario(rank, exact) for scenario in SCENARIOS for exact in (False, True)}
    found["tolerance", False] = merged(rank, False, tolerance=1.0)
    torch.save(found, Path(folder) / f"{rank}.pt")
    leave_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, bool], dict[str, Any]]]:
    """What both processes found in all scenarios, one after the other in one group."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(work, 2, free_port(), str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "scenario",
    [
        "merged",
        "one_has_none",
        "prior_with_other_starts",
        "inside_ddp",
        "synchronised",
        "images",
        SCENARIOS[4].__name__,
    ],
)
def test_all_ranks_end_with_the_same_bits(ranks, scenario: str, exact: bool) -> None:
    """Whatever each of them had, and with which statistics it began."""
    one, two = (found[scenario, exact]["statistics"] for found in ranks)
    assert all(torch.equal(*pair) for name in one for pair in zip(one[name], two[name], strict=True))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("scenario", ["merged", "inside_ddp", "synchronised"])
def test_five_and_three_batches_are_eight(ranks, scenario: str, exact: bool) -> None:
    """Statistics and report are those of one process with all batches; SyncBatchNorm in a group and DDP's wrapper
    change nothing."""
    alone = model()
    report = recalibrate(alone, [*PARTS[0], *PARTS[1]], exact=exact, progress=False).as_dict()
    for found in ranks:
        assert max(largest_errors(found[scenario, exact]["statistics"], statistics(alone))) < 1e-5
        assert [found[scenario, exact]["report"][key] for key in ("batches", "samples", "skipped")] == [8, 64, 0]
        for theirs, ours in zip(found[scenario, exact]["report"]["layers"], report["layers"], strict=True):
            assert theirs["standard_error"] == pytest.approx(ours["standard_error"], rel=1e-4)
            assert (theirs["samples"], theirs["batches"]) == (64, 8)


def test_exact_is_the_full_batch_of_all_ranks(ranks) -> None:
    """Each layer waits for the batches of both."""
    assert max(largest_errors(ranks[0]["merged", True]["statistics"], full_batch(model(), DATA))) < 1e-4
    torch.manual_seed(0)
    chosen, data = cnn(2), torch.rand(24, 1, 5, 5)
    assert max(largest_errors(ranks[1]["images", True]["statistics"], full_batch(chosen, data))) < 1e-4


@pytest.mark.parametrize("exact", [False, True])
def test_a_rank_without_batches_takes_part(ranks, exact: bool) -> None:
    """It ends with what the other one saw."""
    alone = model()
    recalibrate(alone, PARTS[0], exact=exact, progress=False)
    for found in ranks:
        assert max(largest_errors(found["one_has_none", exact]["statistics"], statistics(alone))) < 1e-6
        assert found["one_has_none", exact]["report"]["batches"] == 5


@pytest.mark.parametrize("exact", [False, True])
def test_no_batches_anywhere_raise_everywhere(ranks, exact: bool) -> None:
    """The same error on both ranks, nothing changed."""
    for found in ranks:
        assert "batches is empty" in found["nobody_has_any", exact]["error"]
        assert found["nobody_has_any", exact]["unchanged"]


@pytest.mark.parametrize("exact", [False, True])
def test_a_failure_on_one_rank_is_raised_on_all(ranks, exact: bool) -> None:
    """The rank gets its own exception, the other one learns which rank it was and why; nothing is changed on either."""
    one, two = (found["one_fails", exact] for found in ranks)
    assert two["error"] == "KeyError: 'on rank 1'"
    assert one["error"].startswith(RankError.__name__)
    assert "rank 1: KeyError: 'on rank 1'" in one["error"]
    assert one["unchanged"]
    assert two["unchanged"]


@pytest.mark.parametrize("exact", [False, True])
def test_a_layer_that_one_rank_skips_is_estimated_from_the_other(ranks, exact: bool) -> None:
    """And the layer behind it from both."""
    for found in ranks:
        assert [layer["samples"] for layer in found[SCENARIOS[4].__name__, exact]["report"]["layers"]] == [64, 37, 64]


@pytest.mark.parametrize("exact", [False, True])
def test_with_a_prior_the_first_ranks_statistics_count(ranks, exact: bool) -> None:
    """Ranks whose statistics differed before agree afterwards on the blend with rank 0's."""
    alone = copy.deepcopy(model())
    for layer in (alone[0][1], alone[1][1]):
        layer.running_mean.fill_(0.0)
    recalibrate(alone, [*PARTS[0], *PARTS[1]], exact=exact, prior=20, progress=False)
    assert max(largest_errors(ranks[1]["prior_with_other_starts", exact]["statistics"], statistics(alone))) < 1e-5


def test_with_a_tolerance_each_rank_goes_by_its_own_batches(ranks) -> None:
    """Neither has eight: both use up what they have, and the figures are those of all."""
    for found in ranks:
        report = found["tolerance", False]["report"]
        assert (report["batches"], report["stopped_by"]) == (8, "end")
        assert all(math.isfinite(layer["standard_error"]) for layer in report["layers"])
