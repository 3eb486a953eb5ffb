"""The printed fixes of mistakes that only several ranks can make, applied in two real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import processes
import pytest
from applied_fixes import Program, Run, dataset, run
from found import of, serious
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import TensorDataset

SEEDS = range(3)
MISTAKES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a batch of each device's own": ("BN304", {}, {}),
    "the same, accumulated": ("BN304", {}, {"accumulate_grad_batches": 2}),
    "buffers of each device's own": ("BN306", {"broadcast_buffers": False}, {}),
}
"""The rules, the arguments of the strategy and those of the Trainer."""


def own_class(rank: int) -> TensorDataset:
    """Each rank has the images of one class, as where each reads a folder of its own."""
    images, labels = dataset(192).tensors
    return TensorDataset(images[labels == rank], labels[labels == rank])


def _rank(rank: int, world: int, folder: Path, port: int) -> dict[tuple[str, int], tuple[Run, Run]]:
    processes.environment(rank, world, port)
    results: dict[tuple[str, int], tuple[Run, Run]] = {}
    shared = {"data": own_class(rank), "devices": 2, "default_root_dir": folder, "use_distributed_sampler": False}
    for name, (code, strategy, trainer) in MISTAKES.items():
        for seed in SEEDS:
            options: dict[str, Any] = {"seed": seed, "num_sanity_val_steps": 0, **shared, **trainer}
            wrong = run(Program, strategy=DDPStrategy(**strategy), **options)
            (finding,) = of(code, wrong.findings)
            results[name, seed] = wrong, run(Program, finding, strategy=DDPStrategy(**strategy), **options)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int], tuple[Run, Run]]]:
    """What the fits of each rank came to, with the mistake and mended."""
    return processes.results(_rank, 2, tmp_path_factory.mktemp("fixes"), processes.free_port())


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("rank", range(2))
def test_fix_works_on_each_rank(results: list[dict[tuple[str, int], tuple[Run, Run]]], name: str, rank: int) -> None:
    """With the printed fix nothing above information is said, nor this, and the worst mended network is better on data
    held out than the best other one."""
    runs = [results[rank][name, seed] for seed in SEEDS]
    for _, mended in runs:
        assert serious(mended.findings) == [], "\n".join(map(str, mended.findings))
        assert of(MISTAKES[name][0], mended.findings) == []
    assert max(mended.loss for _, mended in runs) < min(wrong.loss for wrong, _ in runs)
