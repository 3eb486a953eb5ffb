"""How long the page takes: from the click on TensorBoard's tab to the map of 160 layers by 2,000 samples, and a
hover."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browsers import open_browser, tensorboard, wait  # noqa: E402
from journals import write_run  # noqa: E402

TARGET = 2.0  # seconds

_DRAWN = """
const cells = document.querySelector('.area .cells');
return !!cells && cells.offsetParent && cells.getContext('2d').getImageData(0, 0, 1, 1).data[3] > 0;
"""
_CHARTS = "return document.querySelectorAll('section.layer .main-svg').length > 0"
_FRAME = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"  # what was painted is on the screen then
_HOVER = """
const done = arguments[0], times = []; const target = document.querySelector('.area');
const box = target.getBoundingClientRect(), tip = document.querySelector('.tip');
const move = number => {
  if (number == 40) return done(times);
  const before = tip.textContent, start = performance.now();
  const [x, y] = [box.left + box.width * (number + 0.5) / 41, box.top + box.height * (number % 10 + 0.5) / 11];
  target.dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: x, clientY: y}));
  const look = () => requestAnimationFrame(() => {
    if (tip.textContent == before && performance.now() - start < 2000) return look();
    times.push(performance.now() - start);
    setTimeout(() => move(number + 1), 20);
  });
  look();
}; move(0);
"""


def main() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        path = write_run(folder / "logs" / "run", layers=160, samples=2000)
        print(f"160 layers x 2,000 samples: a journal of {path.stat().st_size / 1e6:.0f} MB")
        clicks, charts, hovers = [], [], []
        for number in range(3):
            # A new server and a new browser: nothing is in any cache.
            with (
                tensorboard(folder, "--logdir", str(folder / "logs")) as address,
                open_browser(folder / f"profile{number}") as browser,
            ):
                browser.get(f"{address}/#timeseries")
                time.sleep(8)  # TensorBoard itself is still loading
                start = time.perf_counter()
                browser.execute_script("location.hash = 'lightning_bn'")  # what a click on the tab does
                frame = wait(lambda browser=browser: browser.find_elements("tag name", "iframe"), "the frame")
                browser.switch_to.frame(frame[0])
                wait(lambda browser=browser: browser.execute_script(_DRAWN), "the map", every=0.02)
                browser.execute_async_script(_FRAME)
                clicks.append(time.perf_counter() - start)
                wait(lambda browser=browser: browser.execute_script(_CHARTS), "the layer's charts", every=0.02)
                charts.append(time.perf_counter() - start)
                time.sleep(1)
                hovers += browser.execute_async_script(_HOVER)
    print(f"from the click to the map: {_listed(clicks)} s; the least {min(clicks):.2f} (target {TARGET:g})")
    print(f"from the click to the layer's charts, which plotly.js draws after the map: {_listed(charts)} s")
    print(
        f"from the pointer to the frame with the words: median {statistics.median(hovers):.0f} ms, worst of "
        f"{len(hovers)}: {max(hovers):.0f} ms"
    )


def _listed(seconds: list[float]) -> str:
    return ", ".join(f"{each:.2f}" for each in seconds)


if __name__ == "__main__":
    main()
