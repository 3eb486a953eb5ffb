"""Chromium, driven by selenium; TensorBoard as a process of its own, with this checkout's tab."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import urlopen

import pytest
from processes import free_port

webdriver = pytest.importorskip("selenium.webdriver")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
NEEDS_BROWSER = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium with chromedriver: apt-get install chromium chromium-driver"
)

T = TypeVar("T")

# The installed package may be another checkout's; with its entry point besides, TensorBoard would have the tab twice.
_SERVER = """
import sys
from tensorboard import default, program
from lightning_bn.dashboard.loader import Loader
server = program.TensorBoard(plugins=[*default.get_static_plugins(), Loader])
server.configure(argv=["tensorboard", *sys.argv[1:]])
sys.exit(server.main())
"""


@contextmanager
def open_browser(profile: Path, width: int = 1280, height: int = 1000) -> Iterator[Any]:
    """Start a browser with a window of that size, which keeps what its console says."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    quiet = ("disable-gpu", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
    # --no-sandbox: the tests may run as root, where chromium has none.
    for option in ("headless=new", "no-sandbox", *quiet, f"window-size={width},{height}", f"user-data-dir={profile}"):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    browser.set_script_timeout(60)
    try:
        resize(browser, width, height)
        yield browser
    finally:
        browser.quit()


def resize(browser: Any, width: int, height: int) -> None:
    """Give the page that many points; a window of chromium is never narrower than 500."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def blank(browser: Any) -> None:
    """Leave the page before, and forget what it said: its server may be gone by now."""
    browser.get("about:blank")
    browser.get_log("browser")


@contextmanager
def tensorboard(folder: Path, *arguments: str, prefix: str = "") -> Iterator[str]:
    """Start TensorBoard with those arguments; the address is where it answers."""
    port = free_port()
    address = f"http://127.0.0.1:{port}{prefix}"
    command = [sys.executable, "-c", _SERVER, *arguments, "--host", "127.0.0.1", "--port", str(port)]
    if prefix:
        command += ["--path_prefix", prefix]
    with (folder / "server.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            wait(lambda: answers(f"{address}/"), "TensorBoard's server")
            yield address
        finally:
            server.terminate()


def answers(address: str) -> bool:
    """Whether a server is there."""
    try:
        with urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait(condition: Callable[[], T], what: str, seconds: float = 60, every: float = 0.05) -> T:
    """Return what `condition` does, as soon as that is something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(every)
    raise TimeoutError(f"{what} did not come within {seconds} s")
