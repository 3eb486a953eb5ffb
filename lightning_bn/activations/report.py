"""What a run's loggers are given besides scalars: pictures, text and histograms, drawn once for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lightning_bn.activations.column import Scale, Statistic
from lightning_bn.activations.episodes import Episode, not_healthy
from lightning_bn.activations.heatmap import Pixels, draw_channels, draw_grid
from lightning_bn.activations.registry import STATISTICS
from lightning_bn.activations.sample import Sample
from lightning_bn.activations.sample_to_table import LayerTable, worst_layers
from lightning_bn.tables import markdown_table

# Pictures are drawn at the end, and where the verdict has changed and the run is so many times as long as at the last
# drawing: TensorBoard shows the last ten, and each takes a tenth of a second.
_GROWTH = 2
_SOON = 4  # samples before which there is nothing to tell

_LISTED = 30

_CHANNEL_STD = Scale(-3, 3, "RdBu_r", "standard deviation", log=True)
_CHANNEL_MEAN = Scale(-3, 3, "RdBu_r", "standard deviations of the layer")


class Sink(Protocol):
    """Where a report goes; what a logger can't take it passes over."""

    def image(self, tag: str, pixels: Pixels, step: int) -> None: ...

    def text(self, tag: str, markdown: str, step: int) -> None: ...

    def histogram(self, tag: str, counts: Tensor, step: int) -> None: ...


def image_names() -> dict[str, str]:
    """Return, by statistic, the last part of its picture's tag: numbered, since tags are sorted and not in reading
    order."""
    drawn = [each.name for each in sorted(STATISTICS.values(), key=lambda each: each.rank) if each.mapped]
    return {name: f"{place:02d}_{name}" for place, name in enumerate((*drawn, "channel_std", "channel_mean"), start=1)}


class Report:
    """The pictures, the text and the histograms of one run.

    Args:
        sinks: where they go.
        prefix: of all tags.
        heatmaps: whether to draw.
    """

    def __init__(self, sinks: Sequence[Sink], *, prefix: str = "activations", heatmaps: bool = True) -> None:
        self.sinks = list(sinks)
        self.prefix = prefix
        self.heatmaps = heatmaps
        self._drawn = 0  # samples at that time
        self._told: object = None  # which episodes there were, which of them had recovered, whether there was a mistake
        self._rows: tuple[str, ...] = ()
        self._told_at = 0

    def update(self, table: LayerTable, sample: Sample, step: int, *, has_mistake: bool = False) -> None:
        """Take note of a training sample, the newest in `table`; tell, and draw, where the verdict is another one.

        Args:
            table: of the run.
            sample: the newest of training.
            step: at which it was taken.
            has_mistake: whether another callback has found a mistake, beside which no run is called healthy.
        """
        self._number_rows(table, step)
        for layer, counts in sample.histograms.items():
            for sink in self.sinks:
                sink.histogram(f"{self.prefix}_histogram/{layer}", counts, step)
        samples = table.samples("train")
        # Where something new is sick at every sample, not at every sample.
        is_news = (table.changes, has_mistake) != self._told
        if samples >= _SOON and is_news and samples >= 1.1 * self._told_at:
            self._tell(table, sample, step, has_mistake)
            if samples >= _GROWTH * self._drawn:
                self.draw(table, sample, step)

    def finish(self, table: LayerTable, sample: Sample, step: int, *, has_mistake: bool = False) -> None:
        """Tell and draw what has come since the last time: the run is over."""
        self._number_rows(table, step)  # a validation behind the last training sample may have had new ones
        if self.sinks and (table.changes, has_mistake) != self._told:
            self._tell(table, sample, step, has_mistake)
        self.draw(table, sample, step)

    def _tell(self, table: LayerTable, sample: Sample, step: int, has_mistake: bool) -> None:
        self._told, self._told_at = (table.changes, has_mistake), table.samples("train")
        for sink in self.sinks:
            sink.text(f"{self.prefix}/layers", verdict_markdown(table, sample, has_mistake=has_mistake), step)

    def _number_rows(self, table: LayerTable, step: int) -> None:
        """Tell which layer each number of ``worst_layer`` means, where that is new."""
        rows = tuple(table.places())
        if rows == self._rows:
            return
        self._rows = rows
        lines = markdown_table(("number", "layer"), [(str(place), f"`{row}`") for place, row in enumerate(rows)])
        for sink in self.sinks:
            sink.text(f"{self.prefix}/rows", "\n".join(lines), step)

    def draw(self, table: LayerTable, sample: Sample, step: int) -> None:
        """Draw everything, unless nothing has come since the last time."""
        samples = table.samples("train")
        if samples == self._drawn or not self.heatmaps or not self.sinks:
            return
        self._drawn = samples
        for name, statistic in STATISTICS.items():
            if statistic.mapped and (grid := table.grid("train", name)).layers:
                self._add(name, draw_grid(grid, statistic), step)
        if channels := sample.channels:
            layers = list(channels)
            means, deviations = zip(*channels.values(), strict=True)
            title = f"Standard deviation of each channel, step {step:,}"
            self._add("channel_std", draw_channels(layers, deviations, _CHANNEL_STD, title), step)
            rows = sample.rows
            scaled = [mean / (rows[layer]["std"] or 1.0) for layer, mean in zip(layers, means, strict=True)]
            title = f"Mean of each channel, step {step:,}"
            self._add("channel_mean", draw_channels(layers, scaled, _CHANNEL_MEAN, title), step)

    def _add(self, name: str, pixels: Pixels, step: int) -> None:
        for sink in self.sinks:
            sink.image(f"{self.prefix}_map/{image_names()[name]}", pixels, step)


def verdict_markdown(table: LayerTable, sample: Sample, *, has_mistake: bool = False) -> str:
    """Return, as Markdown, the verdict so far, which layers were sick when, and the worst layer of each statistic; with
    a mistake of modes or statistics no run is called healthy."""
    step, verdict = table.last_step("train"), table.verdict()
    if has_mistake:
        verdict = [*not_healthy(verdict), "A mistake of modes or statistics is open: see what ModeCheck says."]
    lines = [f"**Step {step:,}.**", "", *(f"- {line.strip()}" for line in verdict)]
    episodes = table.episodes()
    if episodes:
        lines += ["", *markdown_table(_SICK, map(_cells, episodes[:_LISTED]), left=2)]
        if len(episodes) > _LISTED:
            lines += ["", f"and {len(episodes) - _LISTED} more."]
    worst = [
        (statistic.label, f"`{layer}`", f"{value:.4g}", _limits(statistic))
        for statistic, layer, value in worst_layers(sample)
    ]
    table_of_worst = markdown_table(("statistic", "layer", "value", "limits"), worst, left=2)
    return "\n".join([*lines, "", "Worst layer of each statistic:", "", *table_of_worst])


_SICK = ("layer", "what", "since step", "until", "peak", "limit")


def _cells(each: Episode) -> tuple[str, ...]:
    until = f"{each.last:,}" if each.recovered else ""
    return f"`{each.layer}`", each.label, f"{each.first:,}", until, f"{each.peak:.4g}", f"{each.limit:g}"


def _limits(statistic: Statistic) -> str:
    if not math.isfinite(statistic.high):
        return "none"
    return f"{statistic.low:g} to {statistic.high:g}" if statistic.low else f"up to {statistic.high:g}"
