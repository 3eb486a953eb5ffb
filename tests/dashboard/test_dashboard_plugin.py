"""The tab's server side: what it finds, what it serves and what it refuses, without a browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from journals import HOSTILE, write_rows, write_run
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client
from werkzeug.wrappers import Response

from lightning_bn.dashboard import loader, plugin
from lightning_bn.dashboard.runs import Root, find_journals, roots_of
from lightning_bn.journal.lines import FILE_NAME
from lightning_bn.journal.writer import Journal


def context(logdir: Path | str = "", spec: str = "") -> TBContext:
    return TBContext(logdir=str(logdir), flags=SimpleNamespace(logdir=str(logdir), logdir_spec=spec))


class Tab:
    """The routes of the plugin, as TensorBoard calls them."""

    def __init__(self, logdir: Path | str = "", spec: str = "") -> None:
        self.plugin = plugin.BatchNormPlugin(context(logdir, spec))
        self.apps = self.plugin.get_plugin_apps()

    def get(self, route: str, **query: Any) -> Response:
        return Client(self.apps[route], Response).get(route, query_string=query)

    def ask(self, route: str, **query: Any) -> Any:
        return json.loads(self.get(f"/data/{route}", **query).get_data())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "sick" / "version_0")
    write_run(folder / "healthy", sick=None, events=False)
    write_run(folder / "nan", sick="nan", events=False)
    write_run(folder / "hostile" / HOSTILE[0].replace("/", ""), layers=[*HOSTILE, "bn"], samples=6, sick=None)
    return folder


def test_it_finds_the_runs_by_tensorboards_names(runs: Path) -> None:
    """Each folder below the log directory that has a journal is a run, named by its path."""
    assert Tab(runs).ask("runs")["runs"] == sorted(["sick/version_0", "healthy", "nan", f"hostile/{HOSTILE[0]}"])
    assert Tab(runs / "healthy").ask("runs")["runs"] == ["."]


def test_logdir_spec(runs: Path) -> None:
    """--logdir_spec's names stand before its runs."""
    spec = f"a:{runs / 'sick'},b:{runs / 'healthy'},{runs / 'nan'}"
    assert Tab(spec=spec).ask("runs")["runs"] == [".", "a/version_0", "b"]
    assert roots_of("", "gs://bucket/x,/with:colon") == [Root("", "gs://bucket/x"), Root("", "/with:colon")]


def test_a_run_as_the_page_gets_it(runs: Path) -> None:
    """Verdict, findings in order with what follows from them, gap, lanes: as write_run planted them."""
    run = Tab(runs).ask("run", run="sick/version_0")
    assert run["verdict"]["text"] == "3 layers sick since step 200; 1 recovered; 1 mistake of modes or statistics"
    names = [(each["code"], each["first"], each["past"], each["follows"]) for each in run["findings"]]
    assert names == [
        ("BN102", 300, False, None),
        ("dead_fraction", 200, False, None),
        ("dead_fraction", 200, False, 1),
        ("dead_fraction", 200, False, 1),
        ("drift_var", 60, True, None),
    ]
    assert [each["level"] for each in run["findings"]] == ["error", *["warning"] * 4]
    assert [each["text"] for each in run["findings"][1:]] == ["up to 1 (limit 0.25)"] * 3 + ["up to 1.7 (limit 1)"]
    assert run["gap"]["rows"] == {"own": 0.3, "recalibrated": pytest.approx(0.4 / 3), "batch": pytest.approx(0.1)}
    assert run["lanes"]["eval"] == [{"layer": "model.layer1.0.bn1", "first": 300, "last": 400}]
    assert [statistic["name"] for statistic in run["statistics"] if statistic["sick"]] == ["dead_fraction"]
    healthy = Tab(runs).ask("run", run="healthy")["verdict"]
    assert healthy["level"] == "healthy"
    assert healthy["nearest"]["layer"].startswith("model.layer1.")


def test_a_summary_counts_layers(tmp_path: Path) -> None:
    """A layer that is ill twice, or by two statistics, is one layer; and a limit of 0 is no percentage."""
    journal = Journal(tmp_path / "run")
    high = {"low": None, "high": 0.0, "healthy": 0.0, "log": False}
    journal.write("statistics", statistics=[{"name": "nonfinite", **high}, {"name": "died", **high}])
    write_rows(journal, "train", 9, 0, {"a": {"nonfinite": 3.0, "died": 0.0}, "b": {"nonfinite": 0.0, "died": 0.0}})
    for layer, statistic, first, over in [
        ("a", "nonfinite", 1, True),
        ("a", "nonfinite", 5, False),
        ("a", "died", 5, False),
        ("b", "died", 2, True),
    ]:
        journal.write(
            "episode", step=9, stage="train", layer=layer, statistic=statistic, first=first, last=9, recovered=over
        )
    (summary,) = Tab(tmp_path).ask("summaries")
    assert (summary["sick"], summary["recovered"], summary["first"], summary["level"]) == (1, 1, 1, "error")
    assert (summary["nearest"]["layer"], summary["nearest"]["used"]) == ("a", 1.0)


def test_a_grid_is_the_tables_numbers(runs: Path) -> None:
    """The map's values are those of the journal, NaN told from missing, and a zoom has its columns alone."""
    lines = [json.loads(line) for line in (runs / "nan" / FILE_NAME).read_text().splitlines()]
    written = [line for line in lines if line["kind"] == "sample" and line["stage"] == "train"]
    grid = Tab(runs).ask("grid", run="nan", statistic="std", stage="train")
    assert grid["first"] == [line["step"] for line in written]
    for row in range(len(grid["layers"])):
        expected = [line["values"]["std"][row] for line in written]
        assert [v if isinstance(v, str) else pytest.approx(v, rel=1e-3) for v in grid["values"][row]] == expected
    zoomed = Tab(runs).ask("grid", run="nan", statistic="std", stage="train", first=100, last=200)
    assert zoomed["first"] == list(range(100, 201, 10))


def test_a_run_in_progress(tmp_path: Path) -> None:
    """What is new is read from where it was read last; half a line waits; a file begun anew is read anew."""
    whole = write_run(tmp_path / "source", layers=3, samples=20, events=False, end=None).read_bytes()
    path = tmp_path / "logs" / "run" / FILE_NAME
    path.parent.mkdir(parents=True)
    cut = whole.index(b"\n", len(whole) // 2) + 20  # in the middle of a line
    path.write_bytes(whole[:cut])
    tab = Tab(tmp_path / "logs")
    first = tab.ask("run", run="run")
    assert tab.ask("run", run="run", revision=first["revision"]) == {
        "revision": first["revision"],
        "changed": first["changed"],
        "same": True,
    }
    with path.open("ab") as file:
        file.write(whole[cut:])
    second = tab.ask("run", run="run")
    assert (first["samples"]["train"] < 20, second["samples"]["train"], second["skipped"]) == (True, 20, 0)
    path.write_bytes(whole[: whole.index(b'{"kind":"epoch","step":60')])
    assert tab.ask("run", run="run")["step"] < 60


@pytest.mark.parametrize("name", ["../secret", "/etc", "..", "sick/../../secret", "nothing", ""])
def test_only_its_own_runs(runs: Path, tmp_path: Path, name: str) -> None:
    """A run is a name from the list: a path, or a name that is not in it, is refused."""
    for route in ("run", "grid", "layer", "channels"):
        answer = Tab(runs / "sick").get(f"/data/{route}", run=name, statistic="std", layer="x")
        assert answer.status_code == 404
        assert json.loads(answer.get_data()) == {"error": "There is no such run."}


def test_no_link_leads_out(tmp_path: Path) -> None:
    """Neither a linked file nor a linked folder from outside of the log directory is a run."""
    outside = write_run(tmp_path / "outside", layers=2, samples=3)
    logs = tmp_path / "logs"
    (logs / "file").mkdir(parents=True)
    (logs / "file" / FILE_NAME).symlink_to(outside)
    (logs / "folder").symlink_to(outside.parent)
    assert find_journals([Root("", str(logs))]) == {}
    shutil.copytree(outside.parent, logs / "own")
    assert list(find_journals([Root("", str(logs))])) == ["own"]


def test_every_answer_keeps_tensorboards_rules(runs: Path) -> None:
    """No cookie, no sniffing of types, and only JavaScript, CSS and JSON, which have no policy of their own to
    break."""
    tab = Tab(runs)
    for route in tab.apps:
        answer = tab.get(route, run="healthy", statistic="std", stage="train", layer="model.layer1.0.bn1")
        assert answer.status_code == 200, route
        assert "Set-Cookie" not in answer.headers
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.mimetype in ("application/javascript", "text/css", "application/json")


def test_an_error_is_contained(runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What goes wrong in an answer is told in it, and in the log; a plugin that can't be made is left out."""
    tab = Tab(runs)
    monkeypatch.setattr(plugin, "overview_of", lambda *_: 1 / 0)
    answer = tab.get("/data/run", run="healthy")
    assert answer.status_code == 500
    assert "ZeroDivisionError" in json.loads(answer.get_data())["error"]
    monkeypatch.setattr(plugin, "BatchNormPlugin", lambda _: 1 / 0)
    assert loader.Loader().load(context(runs)) is None
    assert "could not answer" in caplog.text
    assert "is left out" in caplog.text


def test_it_is_active_where_there_is_a_journal(runs: Path, tmp_path: Path) -> None:
    """TensorBoard shows the tab by itself for a run, and among the inactive ones otherwise."""
    tab = Tab(runs).plugin
    assert tab.is_active() or tab.is_active()  # the first look may still be going on
    assert not Tab(tmp_path).plugin.is_active()
    assert not Tab("").plugin.is_active()


def test_without_plotly_it_says_what_to_install(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page gets the command in place of plotly.js."""
    monkeypatch.setattr(plugin, "plotly_file", lambda: None)
    answer = Tab(runs).get("/plotly.min.js")
    assert answer.status_code == 404
    assert json.loads(answer.get_data()) == {"error": "pip install 'lightning-bn[dashboard]'"}


def test_it_is_imported_in_no_time_and_without_torch() -> None:
    """The entry point's module and the plugin take less than 0.1 s beyond TensorBoard's own, the least of some tries,
    and bring neither torch nor Lightning, nor pandas, matplotlib and plotly."""
    code = (
        "import sys, time; import tensorboard.main, tensorboard.default; before = set(sys.modules); start = "
        "time.process_time(); "
        "import lightning_bn.dashboard.loader, lightning_bn.dashboard.plugin; took = time.process_time() - start; "
        "heavy = {'torch', 'lightning', 'pytorch_lightning', 'torchmetrics', 'pandas', 'matplotlib', 'plotly'}; "
        "print(took, *(set(sys.modules) - before) & heavy)"
    )
    took, found = [], set()
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
        )
        seconds, *heavy = done.stdout.split()
        took.append(float(seconds))
        found |= set(heavy)
    assert not found
    assert min(took) < 0.1
