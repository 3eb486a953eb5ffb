"""An observer that fails on one of two ranks: the other one does not wait for it, and both train on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import trainer
from processes import environment, free_port, results
from small_data import training_data
from small_models import Small
from torch.utils.data import DataLoader

from lightning_bn import ActivationStatsMonitor, CompareAverages, Window
from lightning_bn.activations.collector import LayerCollector
from lightning_bn.activations.host_to_sample import SampleBuilder
from lightning_bn.callbacks.blindness import Blindness
from lightning_bn.callbacks.observing import boundary_of
from lightning_bn.comparison.followers import Followers
from lightning_bn.comparison.scores import Scores
from lightning_bn.error_boundary import RERAISE
from lightning_bn.ranks.collective import LostRankError, RankError

PLACES: dict[str, tuple[str, type, str]] = {
    "the monitor begins": ("ActivationStatsMonitor", LayerCollector, "__init__"),
    "places hooks": ("ActivationStatsMonitor", LayerCollector, "attach"),
    "measures": ("ActivationStatsMonitor", LayerCollector, "measure"),
    "builds the sample that ranks have shared": ("ActivationStatsMonitor", SampleBuilder, "build"),
    "looks for what it misses": ("ActivationStatsMonitor", Blindness, "of_layers"),
    "the comparison begins": ("CompareAverages", Followers, "following"),
    "looks whether all are followed": ("CompareAverages", Followers, "missed"),
    "scores": ("CompareAverages", Scores, "add"),
}
"""By what fails: the callback, and the class and method of its code."""


def fitted(folder: Path, name: str | None, rank: int) -> dict[str, Any]:
    """Fit for two epochs; what `name` says fails on the second rank. Return the weights, and what was warned of."""
    callbacks = [
        ActivationStatsMonitor(every_n_steps=2, verbose=False),
        CompareAverages({"window": Window(3)}, recalibrated=True),
    ]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if name is not None:
            patch.delenv(RERAISE, raising=False)
            if rank == 1:
                patch.setattr(*PLACES[name][1:], lambda *_, **__: 1 / 0)
        torch.manual_seed(0)
        module = Small()
        options = {"devices": 2, "strategy": "ddp", "max_epochs": 2, "default_root_dir": folder}
        trainer(*(callbacks if name else ()), **options).fit(
            module, DataLoader(training_data(), 6), DataLoader(training_data(), 6)
        )
    said = [str(each.message) for each in caught if "has stopped" in str(each.message)]
    return {"weights": module.state_dict(), "said": said}


def _rank(rank: int, world: int, folder: Path, port: int) -> dict[str, Any]:
    environment(rank, world, port)
    return {str(name): fitted(folder, name, rank) for name in (None, *PLACES)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process trained, in all fits one after the other."""
    return results(_rank, 2, tmp_path_factory.mktemp("ranks"), free_port())


@pytest.mark.parametrize("name", PLACES)
def test_both_ranks_train_on(ranks: list[dict[str, Any]], name: str) -> None:
    """The weights are those of the fit without callbacks, and each rank says once that the callback has stopped."""
    for rank in ranks:
        for key, value in rank["None"]["weights"].items():
            assert torch.equal(rank[name]["weights"][key], value), key
        (said,) = rank[name]["said"]
        assert said.startswith(f"{PLACES[name][0]} has stopped")
    assert "ZeroDivisionError" in ranks[1][name]["said"][0]
    assert "failed on rank 1" in ranks[0][name]["said"][0]


@pytest.mark.parametrize(("error", "ends"), [(LostRankError, True), (RankError, False)])
def test_only_a_lost_rank_ends_the_fit(error: type[Exception], ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ranks do together from then on would fail too; that the callback failed elsewhere stops it here."""
    monkeypatch.delenv(RERAISE)
    boundary = boundary_of("ModeCheck")

    def fail() -> None:
        raise error("rank 1")

    with pytest.raises(error) if ends else pytest.warns(UserWarning, match="ModeCheck has stopped"):
        boundary.attempt("", fail)
    assert boundary.closed is not ends
