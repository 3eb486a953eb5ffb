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

_DRAWN = "return !!document.querySelector('.area .plot .heatmaplayer image, .area .plot image')"
_HOVER = """
const done = arguments[0], times = []; const target = document.querySelector('.area .plot .nsewdrag');
const box = target.getBoundingClientRect(), tip = document.querySelector('.tip');
const move = number => {
  if (number == 40) return done(times);
  const before = tip.textContent, start = performance.now();
  const [x, y] = [box.left + box.width * (number + 0.5) / 41, box.top + box.height * (number % 10 + 0.5) / 11];
  target.dispatchEvent(new MouseEvent('mousemove', {bubbles: true, clientX: x, clientY: y}));
  const look = () => {
    if (tip.textContent == before && performance.now() - start < 2000) return setTimeout(look, 0);
    times.push(performance.now() - start);
    setTimeout(() => move(number + 1), 60);
  };
  look();
}; move(0);
"""


def main() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        path = write_run(folder / "logs" / "run", layers=160, samples=2000)
        print(f"160 layers x 2,000 samples: a journal of {path.stat().st_size / 1e6:.0f} MB")
        clicks, hovers = [], []
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
                wait(lambda browser=browser: browser.execute_script(_DRAWN), "the map")
                clicks.append(time.perf_counter() - start)
                time.sleep(2)
                hovers += browser.execute_async_script(_HOVER)
    best = min(clicks)
    print(
        f"from the click to the map: {', '.join(f'{each:.2f}' for each in clicks)} s; the least {best:.2f} (target "
        f"{TARGET:g})"
    )
    print(
        f"from the pointer to the words: median {statistics.median(hovers):.0f} ms, worst of {len(hovers)}: "
        f"{max(hovers):.0f} ms"
    )


if __name__ == "__main__":
    main()
