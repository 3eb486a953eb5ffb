"""An observer that fails on one of two ranks: the other one does not wait for it, and both train on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitting import trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from processes import environment, free_port, results
from small_data import training_data
from small_models import Small
from torch.utils.data import DataLoader

from lightning_bn import ActivationStatsMonitor, BatchNormRecalibration, CompareAverages, ModeCheck, Window
from lightning_bn.activations.collector import LayerCollector
from lightning_bn.activations.host_to_sample import SampleBuilder
from lightning_bn.callbacks import checkpoint_files, recalibration
from lightning_bn.callbacks.blindness import Blindness
from lightning_bn.callbacks.evaluated_weights import EvaluatedWeights
from lightning_bn.callbacks.observing import boundary_of
from lightning_bn.callbacks.recalibrated_sets import LearningLayers, Sources
from lightning_bn.comparison.followers import Followers
from lightning_bn.comparison.scores import Scores
from lightning_bn.error_boundary import RERAISE
from lightning_bn.ranks.collective import LostRankError, RankError
from lightning_bn.rules.inspection import Inspection

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


RECALIBRATION: dict[tuple[str, str], tuple[int, Any, str]] = {
    ("validation", "asks for other weights"): (1, EvaluatedWeights, "are_others"),
    ("validation", "looks at the first batch"): (1, EvaluatedWeights, "look"),
    ("validation", "tells what it ran with"): (1, EvaluatedWeights, "tell_of_others"),
    ("fit_end", "notes which layers learn"): (1, LearningLayers, "note_modes"),
    ("validation", "looks for the layers"): (1, LearningLayers, "take_in"),
    ("fit_end", "opens its batches"): (1, Sources, "recalibrated"),
    ("validation", "opens its batches"): (1, Sources, "recalibrated"),
    ("fit_end", "tells what it did"): (1, recalibration, "what_is_missing"),
    ("validation", "tells what it did"): (1, recalibration, "what_is_missing"),
    ("fit_end", "looks for saved files"): (1, recalibration, "files_of"),
    ("fit_end", "reads the saved file"): (0, Path, "nothing"),
    ("fit_end", "writes the recalibrated copy"): (0, checkpoint_files, "write_atomically"),
}
"""By when a `BatchNormRecalibration` acts and what fails in it: the rank, and the name in which class or module."""

CHECKED = ["attach", "begin_batch", "begin_evaluation", "end_evaluation", "left"]
"""Methods of `Inspection` that fail while each rank has statistics of its own, which ranks compare."""

LATE = ("fit_end", "fails behind the last meeting")


class Failing(pl.Callback):
    """Lets one thing fail in the second of two epochs, and a file be damaged at the end."""

    def __init__(self, patch: pytest.MonkeyPatch, what: tuple[str, str], saver: ModelCheckpoint) -> None:
        self.patch, self.what, self.saver = patch, what, saver

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        rank, *name = RECALIBRATION.get(self.what, (None,))
        if trainer.current_epoch == 1 and trainer.global_rank == rank:
            self.patch.setattr(*name, lambda *_, **__: 1 / 0, raising=False)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if self.what == LATE and trainer.global_rank == 1:
            self.patch.setattr(EvaluatedWeights, "stop_waiting", lambda *_, **__: 1 / 0)
        if "reads the saved file" in self.what and trainer.is_global_zero:
            Path(self.saver.last_model_path).write_bytes(b"")


def recalibrated(folder: Path, what: tuple[str, str]) -> dict[str, Any]:
    """Fit for two epochs with the callback, in which `what` fails."""
    saver = ModelCheckpoint(folder / "-".join(what), save_last=True)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.delenv(RERAISE, raising=False)
        torch.manual_seed(0)
        module = Small()
        options = {"devices": 2, "strategy": "ddp", "max_epochs": 2, "default_root_dir": folder}
        callback = BatchNormRecalibration(when=what[0], checkpoints=["last"])  # type: ignore[arg-type]
        trainer(saver, Failing(patch, what, saver), callback, **options).fit(
            module, DataLoader(training_data(), 6), DataLoader(training_data(), 6)
        )
    said = [str(each.message) for each in caught if "the whole traceback" in str(each.message)]
    copies = [path.name for path in Path(saver.dirpath or "").glob("*-recalibrated.ckpt")]
    parameters = [name for name, _ in module.named_parameters()]
    return {"state": module.state_dict(), "parameters": parameters, "said": said, "copies": copies}


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


def checked(folder: Path, name: str, rank: int) -> dict[str, Any]:
    """Fit for two epochs with a `ModeCheck` and buffers of each rank's own; what `name` says fails on the second."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.delenv(RERAISE, raising=False)
        if rank == 1:
            patch.setattr(Inspection, name, lambda *_, **__: 1 / 0)
        torch.manual_seed(0)
        module = Small()
        apart = DDPStrategy(broadcast_buffers=False)
        options = {"devices": 2, "strategy": apart, "max_epochs": 2, "default_root_dir": folder}
        trainer(ModeCheck(), **options).fit(module, DataLoader(training_data(), 6), DataLoader(training_data(), 6))
    said = [str(each.message) for each in caught if "has stopped" in str(each.message)]
    return {"weights": dict(module.named_parameters()), "said": said}


def _rank(rank: int, world: int, folder: Path, port: int) -> dict[Any, Any]:
    environment(rank, world, port)
    fits = {name: fitted(folder, name, rank) for name in (None, *PLACES)}
    fits |= {name: checked(folder, name, rank) for name in CHECKED}
    return fits | {what: recalibrated(folder, what) for what in (("fit_end", ""), LATE, *RECALIBRATION)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each process trained, in all fits one after the other."""
    return results(_rank, 2, tmp_path_factory.mktemp("ranks"), free_port(), seconds=300)


@pytest.mark.parametrize("name", PLACES)
def test_both_ranks_train_on(ranks: list[dict[Any, Any]], name: str) -> None:
    """The weights are those of the fit without callbacks, and each rank says once that the callback has stopped."""
    for rank in ranks:
        for key, value in rank[None]["weights"].items():
            assert torch.equal(rank[name]["weights"][key], value), key
        (said,) = rank[name]["said"]
        assert said.startswith(f"{PLACES[name][0]} has stopped")
    assert "ZeroDivisionError" in ranks[1][name]["said"][0]
    assert "failed on rank 1" in ranks[0][name]["said"][0]


@pytest.mark.parametrize("name", CHECKED)
def test_a_check_of_statistics_of_each_rank(ranks: list[dict[Any, Any]], name: str) -> None:
    """No rank waits for what the failed one does not send: both train as without it, and the other goes on looking."""
    for rank in ranks:
        for key, value in rank[name]["weights"].items():
            assert torch.equal(rank[None]["weights"][key], value), key
    assert not ranks[0][name]["said"]
    (said,) = ranks[1][name]["said"]
    assert said.startswith("ModeCheck has stopped")
    assert "ZeroDivisionError" in said


@pytest.mark.parametrize("what", RECALIBRATION, ids=" ".join)
def test_a_recalibration_that_fails_on_one_rank(ranks: list[dict[Any, Any]], what: tuple[str, str]) -> None:
    """Both ranks end with the weights of the fit without it and with one set of statistics, and each says what failed
    where."""
    bad = RECALIBRATION[what][0]
    for rank in ranks:
        assert not rank[what]["copies"]
        for name in rank[what]["parameters"]:
            assert torch.equal(rank[what]["state"][name], rank[None]["weights"][name]), name
    for key, value in ranks[0][what]["state"].items():
        assert torch.equal(ranks[1][what]["state"][key], value), key
    (here,), (there,) = ranks[bad][what]["said"], ranks[1 - bad][what]["said"]
    assert here.startswith("BatchNormRecalibration ")
    assert there.startswith("BatchNormRecalibration ")
    assert "EOFError" in here if "reads the saved file" in what else "ZeroDivisionError" in here
    assert f"failed on rank {bad}" in there


def test_a_recalibration_that_fails_when_ranks_meet_no_more(ranks: list[dict[Any, Any]]) -> None:
    """The rank says so itself, by its number; the other has nothing to say, and both have what they would have."""
    (said,) = ranks[1][LATE]["said"]
    assert said.startswith("BatchNormRecalibration has stopped")
    assert "ZeroDivisionError" in said
    assert "(on rank 1; " in said
    assert not ranks[0][LATE]["said"]
    for rank in ranks:
        assert rank[LATE]["copies"] == ["last-recalibrated.ckpt"]
        for key, value in rank["fit_end", ""]["state"].items():
            assert torch.equal(rank[LATE]["state"][key], value), key


def test_a_recalibration_that_does_not_fail(ranks: list[dict[Any, Any]]) -> None:
    """It says nothing of failures, and writes its copy: what the others are compared with."""
    for rank in ranks:
        assert not rank["fit_end", ""]["said"]
        assert rank["fit_end", ""]["copies"] == ["last-recalibrated.ckpt"]


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
