"""The page in a tab of TensorBoard, in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import resize, tensorboard, wait
from journals import write_run
from pages import Page, run_options


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory, runs: Path) -> Path:
    folder = tmp_path_factory.mktemp("tensorboard") / "logs"
    shutil.copytree(runs, folder)
    return folder


@pytest.fixture(scope="module")
def address(logs: Path) -> Iterator[str]:
    with tensorboard(logs.parent, "--logdir", str(logs), prefix="/some/prefix") as found:
        yield found


class TestTensorBoard:
    """The tab."""

    def enter(self, browser: Any, address: str, hash_: str) -> Page:
        resize(browser, 1280, 1000)
        browser.switch_to.default_content()
        browser.get("about:blank")
        browser.get(f"{address}/#{hash_}")
        frame = wait(lambda: browser.find_elements("tag name", "iframe"), "the tab")
        browser.switch_to.frame(frame[0])
        return Page(browser)

    def test_the_tab(self, browser: Any, address: str) -> None:
        """Below a path prefix, under TensorBoard's policy: drawn, clicked, kept in the address."""
        page = self.enter(browser, address, "lightning_bn&p.lightning_bn.run=sick").ready()
        assert "3 layers sick" in page.text(".verdict")
        page.click(".findings .head", "dead")
        page.until(lambda: "p.lightning_bn.step=200" in page.hash(), "the address")
        assert page.hash().startswith("#lightning_bn&")
        again = self.enter(browser, address, page.hash()[1:]).ready()
        again.until(lambda: again.text(".layer h2") == "model.layer1.1.relu#1", "the layer")
        assert [each for each in again.complaints() if "lightning_bn" in each] == []

    def test_it_opens_on_the_run_that_needs_it(self, browser: Any, address: str) -> None:
        """Without a run in the address it is a sick one, and the selector says which are."""
        page = self.enter(browser, address, "lightning_bn").ready()
        assert page.js("return document.querySelector('.verdict').className") == "verdict is-error"
        options = page.until(lambda: [each for each in run_options(page) if "sick: 3" in each], "it")
        assert options == ["sick: 3 layers sick"]
        assert "healthy" in run_options(page)

    def test_dark_as_tensorboard_is(self, browser: Any, address: str) -> None:
        """The page follows TensorBoard's own switch."""
        page = self.enter(browser, address, "lightning_bn&p.lightning_bn.run=healthy").ready()
        for theme, has in (("dark", "add"), ("light", "remove")):
            page.js(f"window.parent.document.body.classList.{has}('dark-mode')")
            page.until(
                lambda theme=theme: page.js("return document.documentElement.dataset.theme") == theme, "the theme"
            )

    def test_a_live_run_keeps_the_selection(self, browser: Any, address: str, logs: Path) -> None:
        """New samples appear by themselves, and what was selected stays."""
        whole = write_run(logs / "live", samples=40, end=None, events=False)
        lines = whole.read_bytes().splitlines(keepends=True)
        whole.write_bytes(b"".join(lines[: len(lines) // 2]))
        wait(lambda: "live" in browser_runs(address), "the run in the list")
        page = self.enter(
            browser, address, "lightning_bn&p.lightning_bn.run=live&p.lightning_bn.layer=model.layer1.0.bn2"
        ).ready()
        before = page.columns()
        with whole.open("ab") as file:
            file.write(b"".join(lines[len(lines) // 2 :]))
        page.until(lambda: page.columns() > before, "the new samples")
        assert page.text(".layer h2") == "model.layer1.0.bn2"
        assert page.text(".state") == "live"

    def test_nothing_there(self, browser: Any, tmp_path: Path) -> None:
        """Where no run is, the page says which lines make one, and where it looked."""
        (tmp_path / "empty").mkdir()
        with tensorboard(tmp_path, "--logdir", str(tmp_path / "empty")) as address:
            page = self.enter(browser, address, "lightning_bn")
            page.until(lambda: "No run to show yet" in page.text(".message"), "the message")
            assert "ActivationStatsMonitor(), ModeCheck()" in page.text(".message pre")
            assert str(tmp_path / "empty") in page.text(".message")
            write_run(tmp_path / "empty" / "first", samples=6)
            wait(lambda: "step" in page.text("header"), "the run that has begun", 30)


def browser_runs(address: str) -> list[str]:
    from urllib.request import urlopen

    with urlopen(f"{address}/data/plugin/lightning_bn/data/runs") as answer:
        return list(json.loads(answer.read())["runs"])
