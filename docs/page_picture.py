"""Make docs/assets/page.png from a real run: the page on the network of examples/sick_network.py whose ReLUs die.

Run it from the repository's root; it needs chromium with chromedriver.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browsers import open_browser, resize, wait  # noqa: E402

from lightning_bn.dashboard.report import find_journal, report_html  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "assets" / "page.png")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=860)
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, str(ROOT / "examples" / "sick_network.py"), "--logs", str(folder)]
        subprocess.run(command, check=True, cwd=folder, capture_output=True)
        report = folder / "report.html"
        report.write_text(report_html({"dead_relu": find_journal(folder / "dead_relu")}), encoding="utf-8")
        with open_browser(folder / "profile") as browser:
            theme = {"name": "prefers-color-scheme", "value": "dark" if options.dark else "light"}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
            resize(browser, options.width, options.height)
            browser.get(f"file://{report}")
            wait(
                lambda: browser.execute_script("return document.querySelectorAll('.layer .main-svg').length > 3"),
                "the page",
            )
            browser.execute_script("return new Promise(done => setTimeout(done, 500))")
            browser.save_screenshot(str(options.output))


if __name__ == "__main__":
    main()
