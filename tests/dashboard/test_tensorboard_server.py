"""The tab in a TensorBoard process of its own: names of runs, prefix, files that grow or are cut short, and what is
refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from browsers import tensorboard
from journals import write_run

from lightning_bn.journal.lines import FILE_NAME

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two log directories; a run that is cut short, a run that a link leads to, and one outside of both."""
    folder = tmp_path_factory.mktemp("server")
    whole = write_run(folder / "one" / "whole", samples=12)
    write_run(folder / "two" / "deep" / "er", samples=6, sick=None, events=False)
    (folder / "one" / "cut").mkdir()
    shutil.copy(whole, folder / "one" / "cut" / FILE_NAME)
    text = whole.read_bytes()
    line = text.index(b'{"kind":"sample","stage":"train","step":60')
    (folder / "one" / "cut" / FILE_NAME).write_bytes(text[: line + 200])  # in the middle of a line
    write_run(folder / "outside" / "secret", samples=6)
    os.symlink(folder / "outside", folder / "one" / "link")
    (folder / "one" / "stolen").mkdir()
    os.symlink(folder / "outside" / "secret" / FILE_NAME, folder / "one" / "stolen" / FILE_NAME)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    spec = f"first:{folder / 'one'},second:{folder / 'two'}"
    with tensorboard(folder, "--logdir_spec", spec, prefix="/a/prefix") as found:
        yield f"{found}/data/plugin/lightning_bn"


def ask(address: str, route: str, **values: str) -> Any:
    query = "&".join(f"{name}={quote(value, safe='')}" for name, value in values.items())
    with urlopen(f"{address}/data/{route}?{query}", timeout=60) as answer:
        return json.loads(answer.read())


def refused(address: str, route: str, **values: str) -> int:
    with pytest.raises(HTTPError) as error:
        ask(address, route, **values)
    error.value.close()
    return error.value.code


def test_runs_of_a_logdir_spec(address: str) -> None:
    """Each under the name of its directory, as TensorBoard itself calls them; nothing that only a link leads to."""
    assert ask(address, "runs")["runs"] == ["first/cut", "first/whole", "second/deep/er"]
    assert [each["name"] for each in ask(address, "summaries")] == ["first/cut", "first/whole", "second/deep/er"]


def test_a_file_that_is_cut_short_goes_on(address: str, folder: Path) -> None:
    """The lines before the cut count; what is written behind it later counts too."""
    run = ask(address, "run", run="first/cut")
    assert (run["samples"]["train"], run["status"], run["skipped"]) == (6, None, 0)
    path, whole = folder / "one" / "cut" / FILE_NAME, (folder / "one" / "whole" / FILE_NAME).read_bytes()
    with path.open("ab") as file:
        file.write(whole[path.stat().st_size :])
    again = ask(address, "run", run="first/cut", revision=run["revision"])
    assert (again["samples"]["train"], again["status"]) == (12, "finished")
    assert ask(address, "run", run="first/cut", revision=again["revision"])["same"] is True
    mine, theirs = (ask(address, "grid", run=name, statistic="std") for name in ("first/cut", "first/whole"))
    assert mine == theirs


@pytest.mark.parametrize(
    "run", ["../outside/secret", "first/../../outside/secret", "first/link/secret", "first/stolen"]
)
@pytest.mark.parametrize("route", ["run", "grid", "layer", "channels"])
def test_what_leads_out_is_refused(address: str, route: str, run: str) -> None:
    """By name alone: a path is no name, and what lies behind a link is no run."""
    assert refused(address, route, run=run, statistic="std", layer="a") == 404


def test_no_cookie_and_no_guessed_types(address: str) -> None:
    """Whatever is asked for."""
    for route in ("data/runs", "index.js", "page.css", "map.js"):
        answer: HTTPResponse
        with urlopen(f"{address}/{route}", timeout=60) as answer:
            assert answer.status == 200
            assert answer.getheader("Set-Cookie") is None
            assert answer.getheader("X-Content-Type-Options") == "nosniff"
