"""``lightning-bn report``: one file, no network, within its size."""

from __future__ import annotations

import base64
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from journals import HOSTILE, write_run

from lightning_bn.cli import main
from lightning_bn.dashboard import report
from lightning_bn.dashboard.assets import STATIC
from lightning_bn.journal.lines import FILE_NAME


def parts(html: str) -> dict[str, Any]:
    found = re.findall(r'<script type="text/plain" data-part="([^"]*)">([^<]*)</script>', html)
    return {name: json.loads(gzip.decompress(base64.b64decode(text))) for name, text in found}


def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command finds the one run below a folder and writes a file of less than 8 MB with all that the page asks
    for."""
    write_run(tmp_path / "runs" / "mine" / "version_0")
    assert main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "out" / "r.html")]) == 0
    html = (tmp_path / "out" / "r.html").read_text()
    assert len(html) < 8e6
    assert "r.html (5.0 MB)" in capsys.readouterr().out
    found = parts(html)
    assert found["runs"]["runs"] == ["mine/version_0"]
    run = found["run/mine/version_0"]
    for statistic in run["statistics"]:
        for stage in statistic["stages"]:
            assert found[f"grid/{stage}/{statistic['name']}/mine/version_0"]["layers"]


def test_two_runs(tmp_path: Path) -> None:
    """The second is there to compare with; two of one name go by their paths."""
    for name in ("a", "b"):
        write_run(tmp_path / name / "x" / "y", samples=6)
    main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "r.html")])
    names = parts((tmp_path / "r.html").read_text())["runs"]["runs"]
    assert names == [str(tmp_path / "a" / "x" / "y"), str(tmp_path / "b" / "x" / "y")]


def test_a_large_run_is_thinned_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below its budget, whatever the run's length; the map says how many samples its columns stand for."""
    monkeypatch.setattr(report, "BUDGET", 200_000)
    path = write_run(tmp_path, layers=60, samples=400)
    html = report.report_html({"run": path})
    found = parts(html)
    assert len(html) < 4.9e6 + 200_000 + 100_000 + 100_000
    grid = found["grid/train/dead_fraction/run"]
    assert len(grid["first"]) < 400 == grid["samples"]
    sick = [layer for layer, values in zip(grid["layers"], grid["values"], strict=True) if max(values) > 0.25]
    assert len(sick) == 3


def test_nothing_is_fetched(tmp_path: Path) -> None:
    """The file's own policy forbids every address; no element asks for one, and names can't become elements."""
    path = write_run(tmp_path / "<b>run", layers=[*HOSTILE, "bn"], samples=3, sick=None)
    html = report.report_html({f"{HOSTILE[0]}": path})
    assert "default-src 'none'" in html
    start = html.index('<script type="text/plain" id="plotly">')
    ours = html[:start] + html[html.index("</script>", start) :]  # all but plotly.js
    assert not re.search(r'<(script|link|img|iframe)[^>]* (src|href)="', ours)
    assert "<img" not in ours


@pytest.mark.parametrize(
    ("runs", "code", "message"),
    [
        ((), 2, "the following arguments are required: RUN"),
        (("nowhere",), 1, "there is no lightning_bn.jsonl in it or below it"),
        (("many",), 1, "2 runs lie below it. Name one or two of them"),
        (("many/a", "many/b", "many/a"), 2, "one run, or two to compare; here are 3"),
    ],
)
def test_what_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: tuple[str, ...], code: int, message: str
) -> None:
    """The message says what was given and what to give; nothing is written."""
    for name in ("a", "b"):
        (tmp_path / "many" / name).mkdir(parents=True)
        (tmp_path / "many" / name / FILE_NAME).write_text("")
    assert main(["report", *(str(tmp_path / run) for run in runs), "--output", str(tmp_path / "r.html")]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_an_empty_journal_is_a_page(tmp_path: Path) -> None:
    """A run that was killed at once has a page too."""
    (tmp_path / FILE_NAME).write_text('{"kind":"journal","ver')
    assert (
        parts(report.report_html({"run": tmp_path / FILE_NAME}))["run/run"]["verdict"]["text"]
        == "No sample has come yet"
    )


def test_without_plotly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what to install."""
    monkeypatch.setattr(report, "plotly_file", lambda: None)
    write_run(tmp_path, samples=3)
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "r.html")]) == 1
    assert "pip install 'lightning-bn[dashboard]'" in capsys.readouterr().err


def test_it_needs_no_torch(tmp_path: Path) -> None:
    """The command starts at once: neither torch nor Lightning is imported."""
    write_run(tmp_path, samples=3)
    code = (
        f"import sys; from lightning_bn.cli import main; main(['report', {str(tmp_path)!r}]); "
        "print(*{'torch', 'lightning'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == ""


def test_nothing_of_anothers_lies_here() -> None:
    """The page's files are modules and a style sheet of this package, of a size that is read."""
    assert {path.suffix for path in STATIC.iterdir()} == {".js", ".css"}
    assert all(len(path.read_text().splitlines()) <= 260 for path in STATIC.iterdir())
