"""DeepSpeed on two real processes, CPUs and gloo, where it is installed: `pip install deepspeed`. It compiles an
operation when it is first used."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from processes import error_of, own_batch
from recalibration_models import largest_errors, statistics
from sharded_fits import BATCHES, DATA, alone, network

from lightning_bn import BatchNormSync, recalibrate

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
STAGES = [1, 2, 3]


def trained(rank: int, stage: int, *, recalibrates: bool) -> dict[str, Any]:
    """Train half of the steps, recalibrate on five batches here and three there, undo it, train the rest."""
    import deepspeed

    model = network()
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    settings = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": zero}
    settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    BatchNormSync().apply(model)
    found: dict[str, Any] = {}
    for step in range(len(BATCHES)):
        if recalibrates and step == 3:
            batches = list(DATA.split(8))
            report = recalibrate(engine, batches[:5] if rank == 0 else batches[5:], progress=False)
            found = {"report": report.as_dict(), "recalibrated": statistics(model)}
            found["exact"] = error_of(lambda: recalibrate(model, [DATA], exact=True, dry_run=True, progress=False))
            report.rollback()
        engine.backward(engine(own_batch(rank, step)).square().mean())
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return found | {"state": {key: value.detach().clone() for key, value in model.state_dict().items()}}


def _rank(rank: int, world: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    processes.environment(rank, world, port)
    os.environ |= {"RANK": str(rank), "LOCAL_SIZE": str(world)}
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    kinds = [(stage, recalibrates) for stage in STAGES for recalibrates in (False, True)]
    results = {kind: trained(rank, kind[0], recalibrates=kind[1]) for kind in kinds}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # DeepSpeed's own groups are not left in order


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    processes.spawn(_rank, 2, str(folder), processes.free_port(), seconds=250)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("stage", STAGES)
def test_trains_and_recalibrates(results: list[dict[Any, Any]], stage: int) -> None:
    """With BatchNormSync, weights and statistics are those of one process on whole batches; a recalibration in between,
    of five batches here and three there, leaves no trace in what is trained afterwards."""
    for result in results:
        plain, ours = result[stage, False], result[stage, True]
        for key, value in alone(BATCHES, True).items():
            torch.testing.assert_close(plain["state"][key], value, rtol=1e-5, atol=1e-5)
            assert torch.equal(ours["state"][key], plain["state"][key])
        assert ours["report"]["batches"] == 8
        assert max(largest_errors(ours["recalibrated"], results[0][stage, True]["recalibrated"])) == 0
        assert ("spread over the ranks" in ours["exact"]) == (stage == 3)
