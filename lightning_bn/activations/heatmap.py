"""Drawing: what a reader of TensorBoard sees of the layers, as pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_bn.activations.column import Scale, Statistic
from lightning_bn.activations.pool_to_host import Array
from lightning_bn.grids import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Pixels = NDArray[np.uint8]

MAX_COLUMNS = 100
DPI = 100
PALE = 0.6  # how far what is in warm-up is on its way to white


def draw_grid(grid: Grid, statistic: Statistic) -> Pixels:
    """Return what `plot_grid` draws: (height, width, 3) uint8."""
    return _pixels(plot_grid(grid, statistic))


def plot_grid(grid: Grid, statistic: Statistic) -> Axes:
    """Draw a statistic: layers downwards in forward order, steps to the right. Names in red are beyond the limits at
    the last step; what is in warm-up is pale, and its name is not red."""
    shown = grid.thinned(MAX_COLUMNS, statistic)
    sick = statistic.sick(grid.values[:, -1]) & ~grid.warming[:, -1]
    axes, bar = _figure(shown.layers, statistic.label[0].upper() + statistic.label[1:])
    _paint(axes, bar, shown.values, statistic.scale, shown.warming)
    _name_layers(axes, shown.layers, sick)
    _name_steps(axes, shown.first.tolist())
    return axes


def draw_channels(layers: Sequence[str], values: Sequence[Array], scale: Scale, title: str) -> Pixels:
    """Draw the spread over the channels of each layer: its channels in ascending order from left to right, stretched to
    one width.

    Args:
        layers: names.
        values: by layer, one value a channel; NaN where there is none.
        scale: their colours.
        title: of the picture.
    """
    share = np.linspace(0, 1, 101)
    rows = []
    for row in values:
        known = row[~np.isnan(row)]
        rows.append(np.quantile(known, share, method="nearest") if len(known) else np.full(len(share), np.nan))
    axes, bar = _figure(layers, title)
    drawn = np.stack(rows)
    _paint(axes, bar, drawn, scale, np.zeros(drawn.shape, dtype=bool))
    _name_layers(axes, layers, np.zeros(len(layers), dtype=bool))
    axes.set_xticks(range(0, 101, 25), [f"{percent} %" for percent in range(0, 101, 25)])
    axes.set_xlabel("channels of each layer, in ascending order")
    return _pixels(axes)


def _figure(layers: Sequence[str], title: str) -> tuple[Axes, Axes]:
    """Axes for the map and for the colour bar over it, where it is in sight however tall the picture is."""
    # Imported late: it takes half a second, and a run without heat maps needs none of it. No pyplot, which would touch
    # the user's figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # In inches. Fixed margins: matplotlib's layout engines draw everything twice.
    rows = min(max(0.22 * len(layers), 1.2), max(0.135 * len(layers), 7.0))
    top, bottom, left, right = 0.95, 0.55, 0.25 + 0.078 * max(map(len, _short(layers))), 0.3
    width, height = 6.4, top + rows + bottom
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, y=1 - 0.06 / height, va="top")
    span = (left / width, 1 - (left + right) / width)
    axes = figure.add_axes((span[0], bottom / height, span[1], rows / height))
    bar = figure.add_axes((span[0], 1 - 0.66 / height, span[1], 0.13 / height))
    return axes, bar


def _paint(axes: Axes, bar_axes: Axes, values: Array, scale: Scale, is_warming: NDArray[np.bool_]) -> None:
    from matplotlib import colormaps

    # Few enough colours to tell apart beside the bar, and for a PNG of half the size.
    colours = colormaps[scale.colours].resampled(33).with_extremes(bad="0.75")
    placed = scale.place(values)
    image = axes.imshow(placed, aspect="auto", interpolation="nearest", cmap=colours, vmin=scale.low, vmax=scale.high)
    if is_warming.any():
        veil = np.zeros((*placed.shape, 4))
        veil[is_warming] = (1, 1, 1, PALE)
        axes.imshow(veil, aspect="auto", interpolation="nearest")
    known = placed[~np.isnan(placed)]
    below, above = bool((known < scale.low).any()), bool((known > scale.high).any())
    extend: Any = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[
        below, above
    ]
    bar = bar_axes.figure.colorbar(image, cax=bar_axes, orientation="horizontal", extend=extend)
    notes = ["grey: no finite value"] * (len(known) < placed.size) + ["pale: warm-up"] * bool(is_warming.any())
    bar.set_label("; ".join((scale.unit, *notes)), fontsize=9)
    bar.ax.xaxis.set_label_position("top")
    bar.ax.xaxis.labelpad = 3
    bar.ax.tick_params(labelsize=8, pad=1)
    if scale.log:
        decades = (
            [scale.low, 0, 2, 4, 6]
            if scale.count
            else list(np.arange(scale.low, scale.high + 1, 1 if scale.high - scale.low < 8 else 3))
        )
        bar.set_ticks(
            decades, labels=["0" if scale.count and decade == scale.low else f"{10.0**decade:g}" for decade in decades]
        )


def _name_steps(axes: Axes, steps: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    # Round numbers, each at the column that covers it; a resumed run's columns need not be evenly spaced.
    wanted = MaxNLocator(6, steps=[1, 2, 5, 10], integer=True).tick_values(steps[0], steps[-1])
    columns = {int(np.searchsorted(steps, step)): step for step in reversed(wanted) if steps[0] <= step <= steps[-1]}
    axes.set_xticks(list(columns), [f"{steps[column]:,}" for column in columns])
    axes.set_xlabel("training step")


def _name_layers(axes: Axes, layers: Sequence[str], sick: NDArray[np.bool_]) -> None:
    names = _short(layers)
    axes.set_yticks(range(len(names)), names, fontsize=9 if len(layers) <= 40 else 8)
    for label, is_sick in zip(axes.get_yticklabels(), sick, strict=True):
        if is_sick:
            label.set_color("firebrick")
            label.set_fontweight("bold")


def _short(layers: Sequence[str], longest: int = 28) -> list[str]:
    """The names without the path that all of them begin with, and the middle of a long one left out."""
    paths = [layer.split(".") for layer in layers]
    # Of a lone layer, or one that all others lie in, the last part stays.
    shortest = min(len(path) for path in paths) - 1
    common = next((depth for depth in range(shortest) if len({path[depth] for path in paths}) > 1), shortest)
    names = [".".join(path[common:]) for path in paths]
    return [name if len(name) <= longest else f"{name[:12]}…{name[-(longest - 13) :]}" for name in names]


def _pixels(axes: Axes) -> Pixels:
    canvas: Any = axes.figure.canvas
    canvas.draw()
    pixels: Pixels = np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
    return pixels
