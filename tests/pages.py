"""The page, as one who looks at it and clicks; and a journal, read by json alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from browsers import wait

from lightning_bn.journal.lines import FILE_NAME

# The colours of the legend beside the ends of its scale, and of every cell of the map (null: transparent).
_SEEN = """
const ramp = document.querySelector('.ramp'), canvas = document.querySelector('.area .cells');
const parts = [...ramp.style.background.matchAll(/rgb\\((\\d+), (\\d+), (\\d+)\\) ([\\d.]+)%/g)];
const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
const cells = [];
for (let row = 0; row < canvas.height; row++) { cells.push([]);
  for (let column = 0; column < canvas.width; column++) { const at = 4 * (row * canvas.width + column);
    cells[row].push(data[at + 3] ? [data[at], data[at + 1], data[at + 2]] : null); } }
return {stops: parts.map(each => each.slice(1, 5).map(Number)), cells};
"""


class Page:
    """The page, as one who looks at it and clicks."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def texts(self, selector: str) -> list[str]:
        return self.js(
            "return [...document.querySelectorAll(arguments[0])].filter(e => e.offsetParent).map(e => e.textContent)",
            selector,
        )

    def text(self, selector: str) -> str:
        return " ".join(self.texts(selector))

    def click(self, selector: str, containing: str = "") -> None:
        """Click the first that is seen, in one go: the page may be drawn anew meanwhile."""
        found = self.js(
            "const found = [...document.querySelectorAll(arguments[0])]"
            ".find(e => e.offsetParent && e.textContent.includes(arguments[1])); found?.click(); return !!found",
            selector,
            containing,
        )
        assert found, (selector, containing)

    def type(self, selector: str, keys: str) -> None:
        """Type into a field; the first drawing may just be taking its place."""
        self.js("document.querySelector(arguments[0]).focus()", selector)
        from selenium.webdriver import ActionChains

        for key in keys:  # to whatever has the focus: a field that was held may have been drawn anew
            ActionChains(self.driver).send_keys(key).perform()

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        return wait(condition, what, 30)

    def columns(self) -> int:
        """How many columns the map has."""
        return int(self.js("return document.querySelector('.area .cells').width"))

    def drawn(self, low: float, high: float) -> np.ndarray:
        """The map, read by its legend: what each cell's colour stands for on a scale from `low` to `high`."""
        seen = self.js(_SEEN)
        stops = np.array(seen["stops"])
        shares = np.linspace(0, 1, 2001)
        ramp = np.stack([np.interp(shares, stops[:, 3] / 100, stops[:, part]) for part in range(3)], axis=1)
        nearest = {
            colour: shares[np.abs(ramp - np.array(colour)).sum(axis=1).argmin()]
            for colour in {tuple(cell) for row in seen["cells"] for cell in row if cell}
        }
        values = [[nearest[tuple(cell)] if cell else np.nan for cell in row] for row in seen["cells"]]
        return low + (high - low) * np.array(values)

    def mark(self, row: int, column: int) -> list[list[int]]:
        """What lies over a cell: its points as red, green, blue and opacity."""
        return self.js(
            """const marks = document.querySelector('.area .marks'), cells = document.querySelector('.area .cells');
            const [across, down] = [marks.width / cells.width, marks.height / cells.height];
            const [x, y] = [Math.ceil(arguments[1] * across), Math.ceil(arguments[0] * down)];
            const [w, h] = [Math.max(1, Math.floor(across) - 1), Math.max(1, Math.floor(down) - 1)];
            const {data} = marks.getContext('2d').getImageData(x, y, w, h);
            return Array.from({length: w * h}, (_, n) => [...data.slice(4 * n, 4 * n + 4)])""",
            row,
            column,
        )

    def at(self, row: int, column: float) -> tuple[int, int]:
        """Where a cell is, from the middle of the map."""
        box = self.js("const b = document.querySelector('.area').getBoundingClientRect(); return [b.width, b.height]")
        x = (column + 0.5) / self.columns() - 0.5
        y = (row + 0.5) / len(self.rows()) - 0.5
        return round(x * box[0]), round(y * box[1])

    def point(self, row: int, column: float) -> Any:
        """Move the pointer to a cell; what is returned goes on from there."""
        from selenium.webdriver import ActionChains

        area = self.driver.find_element("css selector", ".area")
        moves = ActionChains(self.driver, duration=20).move_to_element_with_offset(area, *self.at(row, column))
        moves.perform()
        return ActionChains(self.driver, duration=20)

    def brush(self, first: float, last: float) -> None:
        """Press at one column, and let go at another."""
        across = self.at(0, last)[0] - self.at(0, first)[0]
        self.point(0, first).click_and_hold().move_by_offset(across, 0).release().perform()

    def rows(self) -> list[str]:
        return self.js("return [...document.querySelectorAll('.heatmap .labels .row[title]')].map(e => e.title)")

    def ready(self) -> Page:
        self.until(
            lambda: self.js("return !!document.querySelector('.columns') && !document.querySelector('main').hidden"),
            "the page",
        )
        self.driver.execute_async_script("setTimeout(arguments[0], 300)")  # not being drawn anew for the window's size
        return self

    def hash(self) -> str:
        return self.js("return window.parent.location.hash")

    def complaints(self) -> list[str]:
        """What the console says, but for TensorBoard's own fonts and advice."""
        own = ("font-roboto", "Three.js", "WebGL", "willReadFrequently")
        return [
            each["message"]
            for each in self.driver.get_log("browser")
            if not any(word in each["message"] for word in own)
        ]


def table(folder: Path, statistic: str) -> tuple[list[str], list[list[Any]]]:
    """Layers and values of training, by json alone."""
    lines = [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]
    names = next(line["rows"] for line in lines if line["kind"] == "rows")
    samples = [line["values"][statistic] for line in lines if line["kind"] == "sample" and line["stage"] == "train"]
    return names, [list(row) for row in zip(*samples, strict=True)]


def run_options(page: Page) -> list[str]:
    return page.js("return [...document.querySelectorAll('[data-key=run] option')].map(each => each.textContent)")
