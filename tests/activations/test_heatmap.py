"""The pictures of a run, as pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_bn.activations.column import Scale
from lightning_bn.activations.heatmap import draw_channels, draw_grid
from lightning_bn.activations.registry import COLUMNS, STATISTICS
from lightning_bn.activations.sample import KNOWN, WARM_UP, Sample
from lightning_bn.activations.sample_to_table import LayerTable

matplotlib = pytest.importorskip("matplotlib")


def test_a_picture_has_the_colours_of_the_values() -> None:
    """The pixel in the middle of each cell is the colour that the scale gives to its value; missing ones are grey."""
    steps, layers = (0, 10, 20, 30), ("net.a", "net.b", "net.c")
    values = [[0.001, 1.0, 1000.0, 1.0], [1.0, 0.03, 30.0, 1.0], [1.0, 1.0, math.nan, 1.0]]
    table = LayerTable()
    for column, step in enumerate(steps):
        table.append(
            "train",
            step,
            0,
            Sample.of({layer: {"std": row[column]} for layer, row in zip(layers, values, strict=True)}),
        )
    pixels = draw_grid(table.grid("train", "std"), STATISTICS["std"])
    colours = matplotlib.colormaps["RdBu_r"].resampled(33)
    top, bottom, right = 95, len(pixels) - 55, 640 - 30
    left = round(100 * (0.25 + 0.078 * len("a")))
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            y = round(top + (bottom - top) * (row + 0.5) / 3)
            x = round(left + (right - left) * (column + 0.5) / 4)
            expected = (191, 191, 191) if math.isnan(value) else colours((math.log10(value) + 3) / 6)[:3]
            expected = [round(255 * part) if part <= 1 else part for part in expected]
            assert pixels[y, x].tolist() == pytest.approx(expected, abs=1), (row, column)


@pytest.mark.parametrize("layers", [1, 30, 60, 160])
def test_pictures_are_as_tall_as_their_layers_need(layers: int) -> None:
    """Each layer has a row of at least 13 pixels, in which its name can be read."""
    table = LayerTable()
    for step in range(3):
        table.append("train", step, 0, Sample.of({f"layer{place}.bn": {"std": 1.0} for place in range(layers)}))
    height, width, _ = draw_grid(table.grid("train", "std"), STATISTICS["std"]).shape
    assert (height - 150) / layers >= 13
    assert width == 640


def test_warm_up_is_pale() -> None:
    """A cell in warm-up is drawn three fifths of the way to white, with a word in the legend, and its layer's name is
    not red however large the value is."""
    pictures = []
    for state in (KNOWN, WARM_UP):
        table = LayerTable()
        sample = Sample.of({"a": {"drift_mean": 0.5}, "b": {"drift_mean": 1.9}})
        sample.states[1, COLUMNS.index("drift_mean")] = state
        table.append("train", 0, 0, sample)
        pictures.append(draw_grid(table.grid("train", "drift_mean"), STATISTICS["drift_mean"]).astype(float))
    known, warm = pictures
    y, x = known.shape[0] - 55 - round((known.shape[0] - 150) / 4), 400
    assert known[y, x].tolist() != [255, 255, 255]
    assert warm[y, x].tolist() == pytest.approx((known[y, x] + 0.6 * (255 - known[y, x])).tolist(), abs=2)
    assert (known[:95] != warm[:95]).any()  # the legend
    red = [int(((each[:, :30, 0] > 120) & (each[:, :30, 1] < 90)).sum()) for each in pictures]
    assert red[0] > 0 == red[1]


@pytest.mark.parametrize(
    "name", [name for name, each in STATISTICS.items() if each.mapped and 0 < each.high < math.inf]
)
def test_a_limit_is_no_edge(name: str) -> None:
    """What is at nine tenths of a limit is seen to be no longer healthy: at least three of the 33 colours away."""
    statistic = STATISTICS[name]
    scale = statistic.scale
    healthy = 1.0 if statistic.healthy is None else statistic.healthy
    here, there = np.clip(scale.place(np.array([healthy, 0.9 * statistic.high])), scale.low, scale.high)
    assert abs(there - here) / (scale.high - scale.low) * 32 >= 3


def test_nothing_is_nowhere_drawn_as_sick() -> None:
    """No NaN at all is the palest colour, one NaN is half way to the darkest, and a zero scale is at the cold end."""
    counts, scale = STATISTICS["nonfinite"].scale, STATISTICS["std"].scale
    assert counts.place(np.array([0.0, 1.0])).tolist() == [counts.low, (counts.low + counts.high) / 2]
    assert scale.place(np.array([0.0]))[0] < scale.low
    assert STATISTICS["zero_fraction"].scale.low == 0.5  # a healthy ReLU is pale


def test_channels_are_drawn_in_order() -> None:
    """Each layer's row is its channels in ascending order from left to right, whatever their number; a layer of NaN is
    grey."""
    values = [np.array([2.0, 0.0, 1.0]), np.array([math.nan, math.nan]), np.array([0.0])]
    pixels = draw_channels(["a", "b", "c"], values, Scale(0, 2, "OrRd", "unit"), "title")
    colours = matplotlib.colormaps["OrRd"].resampled(33)
    left, right = round(100 * (0.25 + 0.078)) + 5, 640 - 30 - 5
    y = 95 + round((len(pixels) - 150) / 6)
    for x, value in ((left, 0.0), ((left + right) // 2, 1.0), (right, 2.0)):
        assert pixels[y, x].tolist() == pytest.approx([round(255 * part) for part in colours(value / 2)[:3]], abs=1)
    assert pixels[95 + (len(pixels) - 150) // 2, (left + right) // 2].tolist() == [191, 191, 191]
