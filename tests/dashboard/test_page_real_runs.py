"""The page on the runs of the examples, as TensorBoard shows them: what is drawn is their table, read by pandas."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browsers import NEEDS_BROWSER, blank, resize, tensorboard, wait
from limits import limit
from pages import Page

pytestmark = [NEEDS_BROWSER, pytest.mark.timeout(300)]

EXAMPLES = Path(__file__).parent.parent.parent / "examples"

# What `make demo` begins with, and the networks of the guide, for an epoch each.
_RUNS = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import quickstart, sick_network
quickstart.watched_run()
sick_network.CASES = sick_network.CASES[:2]
sys.argv = ["sick_network.py", "--epochs", "1", "--logs", "runs"]
sick_network.main()
"""


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    command = [sys.executable, "-c", _RUNS, str(EXAMPLES)]
    subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=limit(250))
    return folder / "runs"


@pytest.fixture(scope="module")
def address(logs: Path) -> Iterator[str]:
    with tensorboard(logs.parent, "--logdir", str(logs)) as found:
        yield found


@pytest.fixture
def enter(browser: Any, address: str) -> Callable[[str], Page]:
    def opened(run: str, more: str = "") -> Page:
        resize(browser, 1280, 1000)
        browser.switch_to.default_content()
        blank(browser)
        browser.get(f"{address}/#lightning_bn&p.lightning_bn.run={run}{more}")
        frame = wait(lambda: browser.find_elements("tag name", "iframe"), "the tab")
        browser.switch_to.frame(frame[0])
        return Page(browser).ready()

    return opened


def table(run: Path, statistic: str, stage: str = "train") -> pd.DataFrame:
    """Layers by steps, from the monitor's CSV."""
    rows = pd.read_csv(run / "activation_stats.csv")
    whole = rows[rows.stage == stage].pivot(index="layer", columns="step", values=statistic)
    return whole.dropna(how="all")


def test_the_demos_run(enter: Callable[..., Page], logs: Path) -> None:
    """The layer that was switched off leads the list, a click on it goes to its step; the map is the table."""
    page = enter("quickstart/version_0")
    assert "sick since step 40" in page.text(".verdict")
    expected = table(logs / "quickstart" / "version_0", "dead_fraction")
    page.click(".tabs:not(.views) button", "dead fraction")
    page.until(lambda: page.text(".tabs:not(.views) .is-chosen").startswith("dead fraction"), "the statistic")
    page.until(lambda: page.columns() == expected.shape[1], "the map")
    rows, drawn = page.rows(), page.drawn(0, 1)
    for layer, values in expected.iterrows():
        np.testing.assert_allclose(drawn[rows.index(layer)], values.to_numpy(), atol=0.01)
    page.click(".findings .head", "model.2.2")
    page.until(lambda: page.text("section.layer h2") == "model.2.2", "the layer")
    assert "p.lightning_bn.step=40" in page.hash()
    page.click(".findings .head", "eval mode")
    page.until(lambda: page.text("section.layer h2").startswith("model.1."), "the first layer below it")
    assert "self.model[1].train()" in page.texts("section.layer .advice code")
    page.click("section.layer .rule summary", "Rule BN102")
    page.until(lambda: page.text("section.layer .markdown strong").startswith("BN102"), "the rule")
    assert [each for each in page.complaints() if "lightning_bn" in each] == []


def test_a_sick_network(enter: Callable[..., Page], logs: Path) -> None:
    """The filter leaves the rows that it names; a brush leaves its columns, and these are the table's."""
    page = enter("dead_relu", "&p.lightning_bn.statistic=dead_fraction")
    assert "sick since step" in page.text(".verdict")
    expected = table(logs / "dead_relu", "dead_fraction")
    page.until(lambda: page.columns() == expected.shape[1], "the map")
    page.type("[data-key=filter]", "relu[23]")  # no pattern of the page's: it has * and ?
    page.until(lambda: "No layer has this name" in page.text(".centre"), "the words")
    page.js("const f = document.querySelector('[data-key=filter]'); f.value = ''; f.dispatchEvent(new Event('input'))")
    page.type("[data-key=filter]", "*relu?")
    page.until(lambda: page.rows() and "input" not in page.rows(), "the filter")
    page.brush(2, 5)
    page.until(lambda: page.columns() == 4, "the zoom")
    rows, drawn = page.rows(), page.drawn(0, 1)
    part = expected.iloc[:, 2:6]
    layers = [layer for layer in part.index if layer in rows]
    assert len(layers) == 8
    for layer in layers:
        np.testing.assert_allclose(drawn[rows.index(layer)], part.loc[layer].to_numpy(), atol=0.01)


def test_a_healthy_network_and_two_runs(enter: Callable[..., Page], logs: Path) -> None:
    """A healthy verdict names the layer that is nearest to its limit; the table of all runs leads to the sick one."""
    page = enter("healthy")
    assert "Healthy: no layer was beyond its limits" in page.text(".verdict")
    assert "Nearest to a limit: model." in page.text(".verdict")
    page.click(".views button", "Compare")
    page.until(lambda: page.texts(".table tbody tr"), "the table")
    assert set(page.texts(".table tbody tr td:first-child")) == {"dead_relu", "healthy", "quickstart/version_0"}
    page.click(".table th button", "steps")
    page.until(lambda: page.texts(".table th[aria-sort=descending]"), "the order")
    steps = [int(each) for each in page.texts(".table tbody tr td:nth-child(9)")]
    assert steps == sorted(steps, reverse=True)
    page.click(".table tbody button", "dead_relu")
    page.until(lambda: "sick since step" in page.text(".verdict"), "the other run")
