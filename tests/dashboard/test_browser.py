"""TensorBoard itself, in a real browser: the pages load, and show the pictures and charts of a real run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from limits import limit
from processes import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="no chromium with chromedriver: apt-get install chromium chromium-driver",
    ),
    pytest.mark.timeout(300),
]
webdriver = pytest.importorskip("selenium.webdriver")

# Every element of the page, in shadow roots too, which TensorBoard's tabs are made of.
_ELEMENTS = """
const found = [];
const walk = node => {
  if (node.nodeType == 1) { found.push(node); if (node.shadowRoot) walk(node.shadowRoot); }
  for (const child of node.childNodes) walk(child);
};
walk(document.documentElement);
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Open a tab of TensorBoard on the quickstart's run: ``page("images")`` is the browser that shows it."""
    directory = tmp_path_factory.mktemp("browser")
    examples = Path(__file__).parent.parent.parent / "examples"
    # By default there are no pictures where there is the page.
    program = (
        (examples / "quickstart.py").read_text().replace("StatsMonitor(every", "StatsMonitor(heatmaps=True, every")
    )
    assert "heatmaps" in program
    (directory / "quickstart.py").write_text(program)
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(examples), *sys.path])}
    command = [sys.executable, "quickstart.py"]
    subprocess.run(command, cwd=directory, env=paths, check=True, capture_output=True, timeout=limit(200))
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(directory / "runs"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with (directory / "server.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            _wait(lambda: _answers(address), "TensorBoard's server")
            with _browser(directory / "profile") as browser:

                def show(tab: str) -> Any:
                    browser.get("about:blank")
                    browser.get(f"{address}/#{tab}")
                    return browser

                yield show
        finally:
            server.terminate()


def _browser(profile: Path) -> Any:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    quiet = [
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    ]
    # --no-sandbox: the tests may run as root, where chromium has none.
    for option in ("headless=new", "no-sandbox", *quiet, "window-size=1400,2000", f"user-data-dir={profile}"):
        options.add_argument(f"--{option}")
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


def _answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _wait(condition: Any, what: str, seconds: float = 90) -> Any:
    end = time.monotonic() + limit(seconds)
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.5)
    raise TimeoutError(f"{what} did not come within {seconds} s")


def test_the_images_tab_shows_the_heat_maps(page: Any) -> None:
    """Every heat map of the run is loaded, decoded and laid out."""
    browser = page("images")
    script = (
        _ELEMENTS + "return found.filter(e => e.tagName == 'IMG' && e.naturalWidth > 0 && e.offsetWidth > 0).map(e => "
        "e.naturalWidth)"
    )
    widths = _wait(lambda: len(found := browser.execute_script(script)) >= 8 and found, "eight heat maps")
    assert set(widths) == {640}
    tags = browser.execute_script(
        _ELEMENTS + "return found.filter(e => e.tagName == 'TF-CARD-HEADING').map(e => e.tag)"
    )
    maps = {
        "std",
        "zero_fraction",
        "dead_fraction",
        "nonfinite",
        "drift_mean",
        "drift_var",
        "channel_mean",
        "channel_std",
    }
    assert {re.sub(r"/\d+_", "/", tag) for tag in tags} == {f"activations_map/{name}" for name in maps}


def test_the_custom_scalars_tab_shows_the_charts(page: Any) -> None:
    """The layout's category for training is there at first sight, and each of its charts has drawn lines."""
    browser = page("custom_scalars")
    cards = "const cards = found.filter(e => /^TF-CUSTOM-SCALAR-(MULTI-LINE|MARGIN)-CHART-CARD$/.test(e.tagName));"
    titles = _wait(
        lambda: browser.execute_script(_ELEMENTS + cards + "return cards.map(e => e.title || e._titleDisplayString)"),
        "charts",
    )
    assert len(titles) == 12  # six for training, and six for validation
    drawn = """
    const inside = (card, test) => { let n = 0; const walk = node => { if (node.nodeType == 1) { if (test(node)) n++;
      if (node.shadowRoot) walk(node.shadowRoot); } for (const c of node.childNodes) walk(c); };
      walk(card); return n; };
    return cards.map(card => inside(card, e => e.tagName == 'path' && (e.getAttribute('d') || '').length > 10));
    """
    counts = _wait(
        lambda: min(found := browser.execute_script(_ELEMENTS + cards + drawn)) > 0 and found, "lines in every chart"
    )
    assert len(counts) == 12
