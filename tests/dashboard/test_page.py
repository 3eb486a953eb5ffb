"""The page in a real browser: what is drawn is what the journal says, and what is clicked is what is shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from browsers import NEEDS_BROWSER, resize
from journals import HOSTILE, layer_names
from pages import Page, run_options, table

pytestmark = [NEEDS_BROWSER, pytest.mark.timeout(300)]


def test_what_is_drawn_is_what_the_journal_says(show: Callable[..., Page], runs: Path) -> None:
    """Cell by cell the map has the journal's numbers, in forward order; a folded row has its worst child's."""
    page = show("sick")
    names, values = table(runs / "sick", "dead_fraction")
    rows, drawn = page.rows(), page.drawn(0, 1)
    for name, expected in zip(names, values, strict=True):
        np.testing.assert_allclose(drawn[rows.index(name)], expected, atol=0.01)
    assert [row for row in rows if row in names] == names
    np.testing.assert_allclose(drawn[rows.index("model.layer1")], np.max(values, axis=0), atol=0.01)
    page.click(".row.group", "1 3 of 4")
    page.until(lambda: len(page.rows()) == len(rows) - 4, "the fold")
    assert page.complaints() == []


def test_the_header_and_the_findings(show: Callable[..., Page]) -> None:
    """The verdict and the gap in words; errors stand before warnings, the cause before what follows from it."""
    page = show("sick")
    assert "3 layers sick since step 200; 1 recovered; 1 mistake of modes or statistics" in page.text(".verdict")
    assert "own 0.3" in page.text(".gap")
    assert "recalibrated 0.1333" in page.text(".gap")
    assert "batch 0.1" in page.text(".gap")
    assert page.texts(".findings .group > article .head .layer") == [
        "model.layer1.0.bn1",
        "model.layer1.1.relu#1",
        "model.layer1.0.relu#1",
    ]
    assert page.texts(".findings .group > details > summary") == ["2 findings below it follow"]
    assert page.texts(".tabs:not(.views) button")[:2] == ["dead fraction3", "drift var1"]
    assert page.texts(".lane-label") == [
        "learning rate",
        "epochs",
        "validations",
        "findings",
        "in eval mode",
        "recalibrations",
    ]


def test_a_click_selects_and_the_address_keeps_it(show: Callable[..., Page]) -> None:
    """A finding selects its layer, step and statistic; the address opens the same again."""
    page = show("sick")
    page.click(".findings .head", "log ratio")
    page.until(lambda: page.text(".layer h2") == "model.layer1.0.relu#1", "the layer")
    assert page.text(".tabs:not(.views) .is-chosen").startswith("drift var")
    assert "steps 300 to 400" not in page.text(".layer dl")
    address = page.hash()
    assert "step=60" in address
    again = show("sick", address=address)
    assert again.text(".layer h2") == "model.layer1.0.relu#1"
    assert again.texts(".finding.is-chosen .title") == ["log ratio of batch to running variance (rms over channels)"]
    again.click(".layer .neighbours button", "before")
    again.until(lambda: again.text(".layer h2") == "model.layer1.0.bn1", "its neighbour")
    assert "300 to 400" in again.text(".layer dl")  # it was in eval mode


def test_what_to_do(show: Callable[..., Page]) -> None:
    """A finding has its code to copy and leads to its rule, a layer that can't be looked at has the reason."""
    page = show("sick")
    page.click(".findings .head", "eval mode")
    page.until(lambda: page.text(".layer h2") == "model.layer1.0.bn1", "the layer")
    assert page.texts("section.layer .todo > .advice > .code code") == ["self.train()"]
    page.click("section.layer .rule summary", "Rule BN102")
    page.until(lambda: page.text("section.layer .markdown"), "the rule")
    assert page.text("section.layer .markdown strong") == "BN102 A submodule in eval mode"
    assert page.text("section.layer .markdown p") == "Its running_mean stands still, see the guide."
    assert page.texts("section.layer .markdown pre") == ["model.train()"]
    page.click(".note summary", "1 layer can't be looked at")
    page.until(lambda: "no forward called it as a module" in page.text(".note"), "the reason")
    assert page.complaints() == []


def test_code_and_names_break_behind_their_punctuation(show: Callable[..., Page]) -> None:
    """No word is cut in two by the end of a narrow line, neither in code nor in a layer's name."""
    page = show("sick")
    page.js("document.querySelectorAll('details').forEach(each => each.open = true)")
    lines = """const found = [];
    for (const element of document.querySelectorAll('.code code, .code pre, .finding .layer, section.layer h2')) {
      if (!element.offsetParent) continue;
      const nodes = document.createTreeWalker(element, NodeFilter.SHOW_TEXT), words = [];
      let text = '', node;
      const places = [];
      while ((node = nodes.nextNode())) for (let at = 0; at < node.data.length; at++) {
        text += node.data[at]; places.push([node, at]); }
      for (const word of text.matchAll(/\\w+/g)) {
        const range = document.createRange();
        range.setStart(...places[word.index]);
        const [last, at] = places[word.index + word[0].length - 1];
        range.setEnd(last, at + 1);
        const tops = [...range.getClientRects()].filter(box => box.width).map(box => Math.round(box.top));
        found.push([word[0], new Set(tops).size]);
      }
    }
    return found"""
    for width in (1440, 420):
        resize(page.driver, width, 1000)
        page.until(lambda width=width: page.js("return innerWidth") == width, "the width")
        seen = page.js(lines)
        assert {"parameters", "optimizer", "relu"} <= {word for word, _ in seen}
        assert [word for word, count in seen if count > 1] == []  # of a word that comes twice, both times


def test_channels_are_sorted_and_marked(show: Callable[..., Page]) -> None:
    """The channels of a layer stand in the order of their deviation; dead and drifting ones have marks of their own."""
    page = show("sick", address="#layer=model.layer1.0.bn2")
    drawn = page.until(
        lambda: page.js(
            """const plot = [...document.querySelectorAll('section.layer .plot')].find(
            e => e.data?.some(trace => trace.name == 'standard deviation'));
            const [std] = plot?.data ?? []; return std && {y: std.y, text: std.text, symbol: std.marker.symbol}"""
        ),
        "the channels",
    )
    assert drawn["y"] == sorted(drawn["y"])
    symbols = dict(zip(drawn["text"], drawn["symbol"], strict=True))
    marked = {text: symbol for text, symbol in symbols.items() if symbol != "circle"}
    assert marked == {"channel 3, dead": "x", "channel 5, drifting": "diamond"}
    assert "16 channels, 1 dead, 1 drifting" in page.text("section.layer")


def test_filters_sorting_and_folds(show: Callable[..., Page]) -> None:
    """A pattern, "sick only" and the order choose the rows; filters choose the findings."""
    page = show("large", address="#filter=*layer1.1.*")
    names = layer_names(160)
    assert [row for row in page.rows() if row in names] == names[4:8]
    page = show("large", address="#sick=1")
    assert [row for row in page.rows() if row in names] == names[5:8]
    page = show("large", address="#sort=worst")
    assert page.rows()[:3] == names[5:8]
    assert len(page.rows()) == 160
    page = show("large")
    assert len(page.rows()) < 45  # folded
    page = show("sick", address="#level=error")
    assert page.texts(".findings .head .level") == ["error"]
    page = show("sick", address="#time=past")
    assert page.texts(".findings .head .level") == ["recovered"]
    page.type("[data-key=filter]", "bn2")
    names = set(layer_names(16))
    page.until(lambda: all("bn2" in row for row in page.rows() if row in names), "the filter")
    assert page.js("return document.activeElement.value") == "bn2"  # typing is not interrupted


def test_zoom_and_hover(show: Callable[..., Page]) -> None:
    """A brush shows its steps alone, a double click all; a hover tells layer, step, value, limit and learning rate."""
    page = show("sick")
    page.brush(10, 19)
    page.until(lambda: page.columns() == 10, "the zoom")
    assert "from=100" in page.hash()
    assert "to=190" in page.hash()
    page.click(".tools button", "Whole run")
    page.until(lambda: page.columns() == 60, "the whole run")
    page.brush(30, 20)  # to the left
    page.until(lambda: page.columns() == 11, "the zoom")
    page.point(0, 5).double_click().perform()
    page.until(lambda: page.columns() == 60, "the whole run")
    page.point(page.rows().index("model.layer1.1.relu#1"), 40)
    page.until(lambda: page.text(".tip"), "the words")
    for word in (
        "model.layer1.1.relu#1",
        "step 400",
        "share of channels that are dead: 1",
        "above the limit of 0.25",
        "learning rate 0.01",
    ):
        assert word in page.text(".tip")


def test_what_happened_is_drawn_at_its_step(show: Callable[..., Page]) -> None:
    """Under the map: spans in eval mode, epochs and findings lie below the columns of their steps, also in a zoom."""
    seen = """const lane = document.querySelector('canvas.lane'), scale = lane.height / (16 * arguments[2]);
    const {data} = lane.getContext('2d').getImageData(
        Math.round(arguments[1] * lane.width), Math.round((16 * arguments[0] + 8) * scale), 1, 1);
    return data[3] > 0"""

    def drawn(row: str, column: float, columns: int) -> bool:
        labels = page.texts(".lane-label")
        return bool(page.js(seen, labels.index(row), (column + 0.5) / columns, len(labels)))

    page = show("sick")  # 60 columns of 10 steps; a layer was in eval mode from step 300 to 400
    assert [drawn("in eval mode", column, 60) for column in (25, 29, 31, 35, 39, 42)] == [
        False,
        False,
        *[True] * 3,
        False,
    ]
    assert [drawn("epochs", column - 0.5, 60) for column in (20, 30, 35)] == [True, True, False]
    assert [drawn("findings", column - 0.5, 60) for column in (20, 30, 40)] == [False, True, False]
    page = show("sick", address="#from=200&to=390")
    page.until(lambda: page.columns() == 20, "the zoom")
    assert [drawn("in eval mode", column, 20) for column in (5, 9, 11, 18)] == [False, False, True, True]


def test_marks_besides_the_colour(show: Callable[..., Page]) -> None:
    """Beyond a limit, in warm-up and NaN, the map has a picture over its colours; a map of healthy cells has none."""

    def clear(page: Page, row: int, column: int) -> bool:
        return all(point[3] == 0 for point in page.mark(row, column))

    page = show("sick")
    row = page.rows().index("model.layer1.1.relu#1")
    assert clear(page, row, 19)
    assert not clear(page, row, 20)
    page = show("sick", address="#statistic=drift_var")
    row = page.rows().index("model.layer1.0.bn1")
    assert [clear(page, row, column) for column in (0, 1, 2)] == [False, False, True]  # warming up
    page = show("healthy", address="#statistic=std")
    assert all(clear(page, row, column) for row in (0, 8) for column in (0, 30, 59))
    page = show("nan", address="#statistic=std")
    row = page.rows().index("model.layer1.0.relu#2")
    assert clear(page, row, 29)
    assert page.mark(row, 30)[0] == [0, 0, 0, 255]


def test_keyboard(show: Callable[..., Page]) -> None:
    """Arrows move over layers and steps, and over the tabs; / goes to the filter."""
    from selenium.webdriver.common.keys import Keys

    page = show("sick", address="#layer=model.layer1.0.bn1&step=100")
    heatmap = page.driver.find_element("css selector", ".heatmap")
    heatmap.send_keys(Keys.ARROW_DOWN)
    page.until(lambda: page.text(".layer h2") == "model.layer1.0.relu#1", "the next layer")
    heatmap.send_keys(Keys.ARROW_RIGHT)
    page.until(lambda: "step=110" in page.hash(), "the next step")
    heatmap.send_keys("/")
    assert page.js("return document.activeElement.dataset.key") == "filter"
    page.driver.find_element("css selector", ".tabs:not(.views) .is-chosen").send_keys(Keys.ARROW_RIGHT)
    page.until(lambda: "statistic=drift_var" in page.hash(), "the next statistic")


def test_recalibration_averages_and_comparison(show: Callable[..., Page], runs: Path) -> None:
    """Each view tells what its callback reported; the difference map is the difference of the two journals."""
    page = show("sick", "healthy", address="#view=recalibration")
    assert "val_loss: 0.9 before, 0.4 after" in page.text(".other")
    assert "kept" in page.text(".other h3")
    assert len(page.texts(".other tbody tr")) == 8
    page.click(".views button", "Averages")
    page.until(lambda: page.js("return !!document.querySelector('.other .plot')?.data"), "the averages")
    assert "Recommended: recalibrated" in page.text(".other")
    assert page.texts(".other tbody tr td:first-child") == ["batch", "recalibrated", "window 20", "own"]
    assert page.js("return document.querySelector('.other .plot').data[0].y") == pytest.approx([0.9, 0.45, 0.3])
    page = show("sick", "healthy", address="#view=compare&other=healthy")
    page.until(lambda: page.js("return !!document.querySelector('.difference .plot')?.data"), "the difference")
    expected = np.subtract(*(table(runs / name, "dead_fraction")[1] for name in ("sick", "healthy")))
    np.testing.assert_allclose(
        page.js("return document.querySelector('.difference .plot').data[0].z"), expected, atol=2e-3
    )
    assert page.texts(".table tbody tr td:first-child") == ["sick", "healthy"]


def test_a_file_of_two_runs_opens_their_comparison(show: Callable[..., Page]) -> None:
    """Who names two runs sees the difference, and the verdicts whole; the selector says what is wrong with each."""
    page = show("healthy", "sick")
    page.until(lambda: page.js("return !!document.querySelector('.difference .plot')?.data"), "the difference")
    assert run_options(page) == ["healthy", "sick: 3 layers sick"]
    assert page.js("return document.querySelector('[data-key=other]').value") == "sick"
    rows = page.js(
        "return [...document.querySelectorAll('.table tbody tr')].map(row => [...row.children].map(e => e.textContent))"
    )
    assert [row[:5] for row in rows] == [
        ["sick", "3 layers sick since step 200; 1 recovered; 1 mistake of modes or statistics", "3", "1", "1"],
        ["healthy", "Healthy: no layer was beyond its limits", "0", "0", "0"],
    ]
    resize(page.driver, 1440, 1000)
    page.until(
        lambda: page.js("const t = document.querySelector('.table'); return t.scrollWidth <= t.clientWidth"),
        "the table",
    )
    assert page.complaints() == []


def test_charts_have_words(show: Callable[..., Page]) -> None:
    """Whoever can't see the map or a chart is told what it shows; axes say that they are steps."""
    page = show("sick")
    page.until(lambda: page.js("return document.querySelectorAll('.charts .main-svg').length > 2"), "the charts")
    label = page.js("return document.querySelector('.heatmap').getAttribute('aria-label')")
    assert "3 more" not in label
    assert "beyond the limits: model.layer1.1.relu#1 from step 200" in label
    words = page.js("return [...document.querySelectorAll('.plot')].map(e => [e.role, e.getAttribute('aria-label')])")
    assert len(words) >= 3
    assert all(role == "img" and text for role, text in words)
    assert "train: 0.01" in words[0][1]
    assert "1 at step 590" in words[0][1]
    assert page.js("return document.querySelector('.charts .plot').layout.xaxis.title.text") == "step"
    page.js("document.querySelector('.heatmap').scrollIntoView()")
    assert page.text(".axis-label") == "step"


def test_a_healthy_run_and_one_layer(show: Callable[..., Page]) -> None:
    """The verdict names the layer that is nearest to its limit; one layer is a map too."""
    page = show("healthy")
    assert "Healthy: no layer was beyond its limits" in page.text(".verdict")
    assert "Nearest to a limit: model.layer1." in page.text(".verdict")
    assert "No episode of illness" in page.text(".findings")
    page = show("one")
    assert page.rows() == ["model.layer1.0.bn1"]
    assert page.text(".layer h2") == "model.layer1.0.bn1"
    assert page.complaints() == []


def test_names_are_text(show: Callable[..., Page]) -> None:
    """A run and layers that are called like elements are shown as they are called; nothing of them runs."""
    name = HOSTILE[0].replace("/", "")
    page = show(name)
    assert page.text(".bar .name") == name
    assert set(HOSTILE) <= set(page.rows())
    for layer in HOSTILE:
        page.click(f".row[data-row='{page.rows().index(layer)}']")
        page.until(
            lambda layer=layer: page.js("return document.querySelector('section.layer h2').title") == layer, "the layer"
        )
    for view in ("recalibration", "averages", "map"):
        page.click(f"[data-key='view:{view}']")
    assert page.js("return window.hacked") is None
    assert page.js("return document.querySelectorAll('img[src=x]').length") == 0
    assert page.complaints() == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_legible_wide_and_narrow_light_and_dark(show: Callable[..., Page], width: int, dark: bool) -> None:
    """Nothing hangs over the edge, no text is smaller than 11 points, and text stands out from what is behind it."""
    page = show("sick")
    theme = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", theme)
    resize(page.driver, width, 1000)
    page.until(
        lambda: page.js("return document.documentElement.dataset.theme") == ("dark" if dark else "light"), "the theme"
    )
    page.until(
        lambda: page.js("return document.documentElement.scrollWidth <= innerWidth"), "a layout within the window"
    )
    small = page.js(
        """return [...document.querySelectorAll('#page *')]
        .filter(e => e.offsetParent && !e.children.length && e.textContent.trim())
        .filter(e => parseFloat(getComputedStyle(e).fontSize) < 11).map(e => e.textContent)"""
    )
    assert small == []
    contrast = page.js(
        """const linear = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).map(Number).map(linear);
          return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const back = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
          if (!/, 0\\)$/.test(c)) return c; } return 'rgb(255,255,255)'; };
        const read = ['h2', 'p', 'button', 'dd', 'dt', '.muted', '.level', '.verdict']
          .map(each => `#page ${each}`).join();
        return Math.min(...[...document.querySelectorAll(read)].filter(e => e.offsetParent && !e.disabled).map(e => {
          const [a, b] = [light(getComputedStyle(e).color), light(back(e))].sort((x, y) => y - x);
          return (a + 0.05) / (b + 0.05); }))"""
    )
    assert contrast >= 4.5  # WCAG 2.1, AA
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_exports(show: Callable[..., Page], tmp_path: Path) -> None:
    """The CSV is the map's numbers, and the picture is one."""
    page = show("sick")
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    page.click(".tools button", "CSV")
    page.click(".tools button", "PNG")
    csv = page.until(lambda: next(tmp_path.glob("*.csv"), None), "the table")
    lines = csv.read_text().splitlines()
    assert lines[0].split(",")[:3] == ["layer", "0", "10"]
    assert [line.split(",")[0] for line in lines[1:]] == layer_names(16)
    png = page.until(lambda: next(tmp_path.glob("*.png"), None), "the picture")
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert page.complaints() == []
