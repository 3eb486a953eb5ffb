"""What loggers other than TensorBoard get of the monitor, read back from the files of real ones."""

from __future__ import annotations

import html
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from browsers import wait
from fitting import fit
from lightning.pytorch.loggers import CSVLogger
from limits import limit
from PIL import Image
from small_models import Small

from lightning_bn import ActivationStatsMonitor
from lightning_bn.activations.report import image_names
from lightning_bn.callbacks.loggers import log_files, sinks

MAPS = {"std", "zero_fraction", "nonfinite", "drift_mean", "drift_var", "channel_std", "channel_mean"}


def watched(logger: Any, path: Path) -> ActivationStatsMonitor:
    monitor = ActivationStatsMonitor(every_n_steps=2, verbose=False)
    fit(monitor, logger=logger, max_epochs=1, default_root_dir=path)
    return monitor


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each heat map is a picture in the run's media folder, the verdict a text, page and table are an artifact; the
    table lies where Lightning puts its checkpoints."""
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="watched", save_dir=tmp_path, offline=True)
    monitor = watched(logger, tmp_path / "root")
    logger.experiment.finish()
    pictures = {path.name for path in (tmp_path / "wandb").rglob("media/images/**/*.png")}
    for name in MAPS:
        (drawn,) = [each for each in pictures if each.startswith(image_names()[name])]
        assert Image.open(next((tmp_path / "wandb").rglob(drawn))).size[0] > 300
    assert (tmp_path / "watched" / logger.version / "activation_stats.csv").exists()
    (told, *_) = [path.read_text() for path in (tmp_path / "wandb").rglob("media/html/**/layers*.html")]
    assert monitor.verdict()[0] in html.unescape(told)

    def manifests() -> bytes:
        return b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*.wandb"))

    # A process of wandb's own writes it, and may still be at it.
    assert wait(lambda: b"batch_norm_report.html" in manifests(), "the page among the artifacts")
    assert wait(lambda: b"activation_stats.csv" in manifests(), "the table among the artifacts")


@pytest.mark.filterwarnings("ignore")
def test_mlflow_on_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each heat map is an image of the run, with its step, and the table lies in the run's folder; the verdict is a
    text of the run, and page and table are its artifacts."""
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(experiment_name="watched", save_dir=str(tmp_path / "mlruns"))
    monitor = watched(logger, tmp_path / "root")
    client = logger.experiment
    found = {Path(each.path).name for each in client.list_artifacts(logger.run_id, "images")}
    for name in MAPS:
        assert any(image_names()[name] in each and each.endswith(".png") for each in found), name
    assert "activations/std/median" in client.get_run(logger.run_id).data.metrics
    (told,) = (tmp_path / "mlruns").rglob("artifacts/activations/layers.md")
    assert f"- {monitor.verdict()[0]}" in told.read_text()
    kept = {Path(each.path).name for each in client.list_artifacts(logger.run_id, "lightning_bn")}
    assert kept == {"batch_norm_report.html", "activation_stats.csv"}


@pytest.mark.filterwarnings("ignore")
def test_comet_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, pictures, verdict, page and table are in the archive that ``comet upload`` sends."""
    pytest.importorskip("comet_ml")
    from lightning.pytorch.loggers import CometLogger

    # CometLogger(online=False) of lightning 2.6.6 turns its experiment off.
    monkeypatch.setenv("COMET_START_ONLINE", "false")
    monkeypatch.setenv("COMET_LOGGING_CONSOLE", "ERROR")
    logger = CometLogger(project="watched", offline_directory=str(tmp_path / "offline"))
    monitor = watched(logger, tmp_path / "root")
    logger.experiment.end()
    (archive,) = (tmp_path / "offline").glob("*.zip")
    with zipfile.ZipFile(archive) as file:
        messages = [json.loads(line) for line in file.read("messages.json").splitlines()]
        uploads = [each["payload"] for each in messages if each["type"] == "file_upload"]
        told = [each for each in uploads if each["metadata"] == {"tag": "activations/layers"}]
        assert any(monitor.verdict()[0] in file.read(each["file_path"]).decode() for each in told)
        assets = {each["additional_params"]["fileName"]: each for each in uploads if each["upload_type"] == "asset"}
        assert set(assets) == {"lightning_bn/batch_norm_report.html", "lightning_bn/activation_stats.csv"}
        page = file.read(assets["lightning_bn/batch_norm_report.html"]["file_path"])
    assert page.startswith(b"<!doctype html>")
    drawn = {each["additional_params"].get("figName") for each in uploads}
    assert {f"activations_map/{image_names()[name]}" for name in MAPS} <= drawn
    numbers = {each["payload"]["metric"]["metricName"] for each in messages if each["type"] == "metric_msg"}
    assert "activations/std/median" in numbers


def test_comet() -> None:
    """Comet is called as its documentation says."""
    calls: list[Any] = []

    class Experiment:
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: calls.append((name, args, kwargs))

    logger: Any = type("CometLogger", (), {"experiment": Experiment()})()
    (sink,) = sinks([logger], "activations")
    pixels = np.full((2, 3, 3), 255, dtype=np.uint8)
    sink.image("activations_map/01_std", pixels, 7)
    sink.text("activations/layers", "Healthy", 7)
    log_files([logger], [Path("report.html")])
    assert calls == [
        ("log_image", (pixels,), {"name": "activations_map/01_std", "step": 7}),
        ("log_text", ("Healthy",), {"step": 7, "metadata": {"tag": "activations/layers"}}),
        ("log_asset", ("report.html",), {"file_name": "lightning_bn/report.html"}),
    ]


@pytest.mark.filterwarnings("ignore")
def test_swanlab_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SwanLab gets numbers, pictures and the verdict; its ``log_dir`` is that of all runs, so each run's table and
    journal lie in a folder of its own."""
    pytest.importorskip("swanlab")
    from swanlab.integration.pytorch_lightning import SwanLabLogger

    monkeypatch.chdir(tmp_path)
    folders = set()
    for _ in range(2):
        logger = SwanLabLogger(project="watched", mode="offline", log_dir=str(tmp_path / "logs"), save_dir=tmp_path)
        shown: list[str] = []
        monkeypatch.setattr(logger, "log_text", lambda key, texts, step=None, to=shown: to.extend(texts))
        monitor = watched(logger, tmp_path / "root")
        assert any(monitor.verdict()[0] in text for text in shown)
        folders |= {path.parent for path in tmp_path.rglob("lightning_bn.jsonl")}
        import swanlab

        swanlab.finish()
    assert len(folders) == 2
    assert all((folder / "activation_stats.csv").exists() for folder in folders)


@pytest.mark.filterwarnings("ignore")
def test_aim_on_files(tmp_path: Path) -> None:
    """Numbers, pictures and the verdict are read back from Aim's store, once its index is made: without ``aim up`` that
    takes ``aim storage reindex``. Page and table are artifacts, where the run has a store for these."""
    aim = pytest.importorskip("aim")
    from aim.pytorch_lightning import AimLogger
    from aim.storage.context import Context

    quiet = {"system_tracking_interval": None, "capture_terminal_logs": False, "log_system_params": False}
    logger = AimLogger(repo=str(tmp_path), experiment="watched", **quiet)
    logger.experiment.set_artifacts_uri(f"file://{tmp_path}/artifacts")
    monitor = watched(logger, tmp_path / "root")
    number = logger.version
    logger.experiment.close()
    command = [str(Path(sys.executable).parent / "aim"), "storage", "--repo", str(tmp_path), "reindex"]
    subprocess.run(command, input="y\n", text=True, check=True, capture_output=True, timeout=limit(60))
    run, everywhere = aim.Repo(str(tmp_path)).get_run(number), Context({})
    texts = [each.data for each in run.get_text_sequence("activations/layers", everywhere).values.values_list()]
    assert any(monitor.verdict()[0] in text for text in texts)
    for name in MAPS:
        assert run.get_image_sequence(f"activations_map/{image_names()[name]}", everywhere) is not None, name
    assert "activations/std/median" in {metric.name for metric in run.metrics()}
    assert set(run.artifacts) == {"lightning_bn/batch_norm_report.html", "lightning_bn/activation_stats.csv"}
    page = Path(run.artifacts["lightning_bn/batch_norm_report.html"].download(str(tmp_path / "down")))
    assert page.read_text().startswith("<!doctype html>")


def test_aim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aim tracks pictures and texts as objects of its own classes, called as its documentation says."""
    monkeypatch.setitem(
        sys.modules, "aim", SimpleNamespace(Image=lambda it: ("image", it), Text=lambda it: ("text", it))
    )
    calls: list[Any] = []
    experiment = SimpleNamespace(track=lambda value, **where: calls.append((value, where)), artifacts_uri=None)
    (sink,) = sinks([type("AimLogger", (), {"experiment": experiment})()], "activations")
    pixels = np.full((2, 3, 3), 255, dtype=np.uint8)
    sink.image("activations_map/01_std", pixels, 7)
    sink.text("activations/layers", "Healthy", 7)
    assert not sink.keeps_files
    sink.files([Path("report.html")])  # nowhere to put it
    assert calls == [
        (("image", pixels), {"name": "activations_map/01_std", "step": 7}),
        (("text", "Healthy"), {"name": "activations/layers", "step": 7}),
    ]


@pytest.mark.filterwarnings("ignore")
def test_an_alert_of_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of the documentation, with an episode of a real fit: the alert is in trackio's own store."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    trackio.init(project="watched", name="sick", embed=False)
    module = Small()
    module.bn1.weight.data.mul_(1e6)
    monitor = ActivationStatsMonitor(
        every_n_steps=1,
        verbose=False,
        on_episode=lambda episode: trackio.alert(title=f"{episode.layer} is sick", text=f"{episode}. {episode.advice}"),
    )
    fit(monitor, module=module, max_epochs=1, default_root_dir=tmp_path / "root")
    trackio.finish()
    titles = [alert["title"] for alert in trackio.sqlite_storage.SQLiteStorage.get_alerts("watched")]
    assert f"{monitor.episodes()[0].layer} is sick" in titles


class OneFolder(CSVLogger):
    """A logger whose `log_dir` is that of all its runs."""

    @property
    def log_dir(self) -> str:
        return self.save_dir


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_runs_in_one_folder_are_kept_apart(tmp_path: Path) -> None:
    """Where a logger's ``log_dir`` is its ``save_dir``, two runs have a journal each."""
    for version in ("a", "b"):
        watched(OneFolder(tmp_path, name="net", version=version), tmp_path / "root")
    assert sorted(path.parent.name for path in tmp_path.rglob("lightning_bn.jsonl")) == ["a", "b"]


def test_pictures_sort_in_reading_order() -> None:
    """Sorted as text, as TensorBoard sorts, the tags are in the order in which one reads: what tells most comes
    first."""
    names = list(image_names().values())
    assert names == sorted(names)
    assert [name[3:] for name in names[:2]] == ["nonfinite", "dead_fraction"]
