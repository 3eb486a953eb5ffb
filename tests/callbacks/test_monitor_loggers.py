"""What loggers other than TensorBoard get of the monitor, read back from the files of real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fitting import fit
from PIL import Image

from lightning_bn import ActivationStatsMonitor
from lightning_bn.activations.report import image_names
from lightning_bn.callbacks.loggers import sinks

MAPS = {"std", "zero_fraction", "nonfinite", "drift_mean", "drift_var", "channel_std", "channel_mean"}


def watched(logger: Any, path: Path) -> ActivationStatsMonitor:
    monitor = ActivationStatsMonitor(every_n_steps=2, verbose=False)
    fit(monitor, logger=logger, max_epochs=1, default_root_dir=path)
    return monitor


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each heat map is a picture in the run's media folder, and the table lies where Lightning puts its checkpoints."""
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="watched", save_dir=tmp_path, offline=True)
    watched(logger, tmp_path / "root")
    logger.experiment.finish()
    pictures = {path.name for path in (tmp_path / "wandb").rglob("media/images/**/*.png")}
    for name in MAPS:
        (drawn,) = [each for each in pictures if each.startswith(image_names()[name])]
        assert Image.open(next((tmp_path / "wandb").rglob(drawn))).size[0] > 300
    assert (tmp_path / "watched" / logger.version / "activation_stats.csv").exists()


@pytest.mark.filterwarnings("ignore")
def test_mlflow_on_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each heat map is an image of the run, with its step, and the table lies in the run's folder."""
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(experiment_name="watched", save_dir=str(tmp_path / "mlruns"))
    watched(logger, tmp_path / "root")
    client = logger.experiment
    found = {Path(each.path).name for each in client.list_artifacts(logger.run_id, "images")}
    for name in MAPS:
        assert any(image_names()[name] in each and each.endswith(".png") for each in found), name
    assert "activations/std/median" in client.get_run(logger.run_id).data.metrics
    assert len(list((tmp_path / "mlruns").rglob("activation_stats.csv"))) == 1


@pytest.mark.parametrize("kind", ["CometLogger", "NeptuneLogger"])
def test_loggers_of_services(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comet and Neptune, which need an account, are called as their documentation says."""
    calls: list[Any] = []

    class Series:
        def append(self, image: Any, step: int) -> None:
            calls.append((image, step))

    class Experiment:
        def log_image(self, image: Any, *, name: str, step: int) -> None:
            calls.append((name, image, step))

        def __getitem__(self, tag: str) -> Series:
            calls.append(tag)
            return Series()

    logger = type(kind, (), {"experiment": Experiment()})()
    (sink,) = sinks([logger], "activations")
    pixels = np.full((2, 3, 3), 255, dtype=np.uint8)
    if kind == "CometLogger":
        sink.image("activations_map/01_std", pixels, 7)
        assert calls == [("activations_map/01_std", pixels, 7)]
    else:
        import sys
        import types

        module: Any = types.ModuleType("neptune.types")
        module.File = type("File", (), {"as_image": staticmethod(lambda data: ("image", float(data.max())))})
        monkeypatch.setitem(sys.modules, "neptune", types.ModuleType("neptune"))
        monkeypatch.setitem(sys.modules, "neptune.types", module)
        sink.image("activations_map/01_std", pixels, 7)
        assert calls == ["activations_map/01_std", (("image", 1.0), 7)]


def test_pictures_sort_in_reading_order() -> None:
    """Sorted as text, as TensorBoard sorts, the tags are in the order in which one reads: what tells most comes
    first."""
    names = list(image_names().values())
    assert names == sorted(names)
    assert [name[3:] for name in names[:2]] == ["nonfinite", "dead_fraction"]
