"""The callbacks in fits over two real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from fitting import fit
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from small_data import loader, training_data
from states import matches_weights, same

from lightning_bn import BatchNormRecalibration, CompareAverages, Cumulative, Exponential


def own_batches(rank: int) -> list[tuple[torch.Tensor, ...]]:
    """Five batches for rank 0 and three for rank 1, of unequal sizes: together the training data."""
    return list(training_data().tensors[0].split([4, 9, 2, 6, 10, 3, 8, 6]))[5 * rank : 5 + 3 * rank]


def _fits(rank: int, world: int, path: Path, port: int) -> dict[str, Any]:
    processes.environment(rank, world, port)
    ddp: dict[str, Any] = {"strategy": "ddp", "devices": world, "use_distributed_sampler": True}
    result: dict[str, Any] = {}

    def remember(name: str, *callbacks: Any, **options: Any) -> None:
        module, runner = fit(*callbacks, train=loader(), **(ddp | options))
        result[name] = {
            "state": module.state_dict(),
            "step": runner.global_step,
            "metrics": dict(runner.callback_metrics),
        }

    remember("plain")
    remember("fit_end", BatchNormRecalibration())
    unequal = BatchNormRecalibration(dataloader=[(batch,) for batch in own_batches(rank)])
    remember("unequal", unequal)
    result["unequal"]["batches"] = unequal.report.batches
    saver = ModelCheckpoint(path / "checkpoints", monitor="val_loss", save_last=True)
    averaging = EMAWeightAveraging(use_buffers=False, decay=0.8)
    callback = BatchNormRecalibration(when="validation", monitor="val_loss", checkpoints=("best", "last"))
    remember("everything", callback, averaging, saver)
    result["everything"]["kept"] = callback.kept
    compare = CompareAverages({"ema": Exponential(0.1), "all": Cumulative()})
    remember("compare", compare, logger=CSVLogger(path, name="", version="csv"), log_every_n_steps=1)
    result["compare"]["values"] = compare.scores.values
    result["compare"]["recommended"] = compare.recommended
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return [each | {"folder": folder} for each in processes.results(_fits, 2, folder, processes.free_port())]


@pytest.mark.parametrize("name", ["fit_end", "unequal"])
def test_all_ranks_end_with_the_statistics_of_all_data(results: list[dict[str, Any]], name: str) -> None:
    """Merged over the ranks, five batches here and three there, and the same on both to the bit."""
    one, two = (result[name]["state"] for result in results)
    assert matches_weights(one)
    assert same(one.values(), two.values())


def test_training_does_not_notice(results: list[dict[str, Any]]) -> None:
    """Weights and steps are those of a fit over two processes without the callbacks."""
    for result in results:
        for name in ("fit_end", "unequal", "everything", "compare"):
            weights = {key: value for key, value in result["plain"]["state"].items() if "running" not in key}
            assert result[name]["step"] == result["plain"]["step"]
            if name != "everything":  # which ends with averaged weights
                assert all(torch.equal(result[name]["state"][key], value) for key, value in weights.items())


def test_the_batches_are_counted_over_the_ranks(results: list[dict[str, Any]]) -> None:
    """Five and three."""
    assert [result["unequal"]["batches"] for result in results] == [8, 8]


def test_ranks_decide_alike_and_write_each_file_once(results: list[dict[str, Any]]) -> None:
    """monitor keeps or rolls back on both; the copies of the checkpoints match their weights."""
    one, two = (result["everything"] for result in results)
    assert one["kept"] == two["kept"]
    assert same(one["state"].values(), two["state"].values())
    copies = sorted((results[0]["folder"] / "checkpoints").glob("*-recalibrated.ckpt"))
    assert len(copies) == 2
    assert all(matches_weights(torch.load(path, weights_only=False)["state_dict"]) for path in copies)


def test_the_comparison_is_the_same_on_all_ranks(results: list[dict[str, Any]]) -> None:
    """The values are means over the ranks, and the layers' own statistics and logged metrics are untouched."""
    one, two = results
    assert one["compare"]["values"] == two["compare"]["values"]
    assert one["compare"]["recommended"] == two["compare"]["recommended"]
    assert set(one["compare"]["values"]) == {"own", "ema", "all", "recalibrated"}
    for result in results:
        assert same(result["plain"]["state"].values(), result["compare"]["state"].values())
        assert result["plain"]["metrics"] == result["compare"]["metrics"]
