"""What this package writes into TensorBoard; the only file that knows a SummaryWriter.

Tags, with the default prefix, and ``activations_val``, ``activations_test`` in its place for those stages' scalars:

| tag | what |
|---|---|
| ``activations/<statistic>/worst``, ``/median`` | scalar: the value of the layer farthest from healthy; the median over layers |
| ``activations/<scale>/smallest``, ``/largest`` | scalar, of `std` and `grad_std`, which can be sick on either side |
| ``activations/<statistic>/<layer>`` | scalar, for the layers asked for |
| ``activations_map/<statistic>`` | image: layer x step |
| ``activations_map/channel_mean``, ``/channel_std`` | image: the spread over the channels of each layer at the newest sample |
| ``activations/layers`` | text: which layers are sick and since when, and the worst layer of each statistic |
| ``activations_histogram/<layer>`` | histogram, for the layers asked for |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_bn.activations.heatmap import draw_channels, draw_grid
from lightning_bn.activations.layer_table import LayerTable, worst_layers
from lightning_bn.activations.reading import histogram_edges
from lightning_bn.activations.registry import STATISTICS, Scale, Statistic
from lightning_bn.activations.sample import Sample

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoardReport", "add_markdown", "layout"]

# Pictures are drawn again when the run is so many times as long: TensorBoard shows the last ten, and each takes a tenth
# of a second.
_GROWTH = 2

_LISTED = 30


def layout(prefix: str) -> dict[str, dict[str, list[Any]]]:
    """Return the layout of the Custom Scalars tab: a chart a statistic that has one. Two lines a chart, since all have
    the run's one colour."""

    def chart(statistic: Statistic, prefix: str) -> list[Any]:
        if statistic.band:
            # A margin chart takes exactly three tags, by name: the line, then the lower and the upper edge.
            return ["Margin", [f"{prefix}/{statistic.name}/{which}" for which in ("median", "smallest", "largest")]]
        return ["Multiline", [f"^{prefix}/{statistic.name}/{which}$" for which in ("worst", "median")]]

    return {
        f"Batch norm, {stage}": {
            each.chart: chart(each, of_stage) for each in STATISTICS.values() if each.chart is not None
        }
        for stage, of_stage in (("training", prefix), ("validation", f"{prefix}_val"))
    }


def add_markdown(writer: SummaryWriter, tag: str, text: str, step: int) -> None:
    """Write `text`, Markdown, to the Text tab."""
    writer.add_text(tag, text, step)


class TensorBoardReport:
    """The pictures, the text and the histograms of one run, in one event file.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`.
        prefix: of all tags.
        heatmaps: whether to draw.
    """

    def __init__(self, writer: SummaryWriter, *, prefix: str = "activations", heatmaps: bool = True) -> None:
        self.writer = writer
        self.prefix = prefix
        self.heatmaps = heatmaps
        self._next_drawing = 4
        self._drawn = 0
        self._told = 0  # episodes
        writer.add_custom_scalars(layout(prefix))

    def update(self, table: LayerTable, sample: Sample, step: int) -> None:
        """Take note of a training sample, the newest in `table`; draw when the run is twice as long as at the last
        drawing."""
        for layer, counts in sample.histograms.items():
            self._add_histogram(f"{self.prefix}_histogram/{layer}", counts, step)
        due = table.samples("train") >= self._next_drawing
        if due or table.episodes_begun > self._told:
            self._told = table.episodes_begun
            add_markdown(self.writer, f"{self.prefix}/layers", tell(table, sample), step)
        if due:
            self.draw(table, sample, step)

    def draw(self, table: LayerTable, sample: Sample, step: int) -> None:
        """Draw everything, unless nothing has come since the last time."""
        samples = table.samples("train")
        if samples == self._drawn or not self.heatmaps:
            return
        self._drawn, self._next_drawing = samples, samples * _GROWTH
        for name in (each.name for each in STATISTICS.values() if each.mapped):
            grid = table.grid("train", name)
            if grid.layers:
                self._add_image(name, draw_grid(grid), step)
        if sample.channels:
            layers = list(sample.channels)
            means, deviations = zip(*sample.channels.values(), strict=True)
            title = f"Standard deviation of each channel, step {step:,}"
            self._add_image("channel_std", draw_channels(layers, deviations, _CHANNEL_STD, title), step)
            rows = sample.rows
            scaled = [mean / (rows[layer]["std"] or 1.0) for layer, mean in zip(layers, means, strict=True)]
            title = f"Mean of each channel, step {step:,}"
            self._add_image("channel_mean", draw_channels(layers, scaled, _CHANNEL_MEAN, title), step)

    def _add_image(self, name: str, pixels: np.ndarray[Any, Any], step: int) -> None:
        self.writer.add_image(f"{self.prefix}_map/{name}", pixels, step, dataformats="HWC")

    def _add_histogram(self, tag: str, counts: Tensor, step: int) -> None:
        kept = counts.nonzero().flatten()
        if not len(kept):
            return  # no finite value: TensorBoard has no empty histogram
        edges = histogram_edges()
        # The outermost buckets are open; what is in them counts as one bucket's width beyond the edge.
        limits = np.concatenate((edges.numpy(), [float(edges[-1]) * 2]))
        first, last = int(kept[0]), int(kept[-1])
        lower = np.concatenate(([float(edges[0]) * 2], edges.numpy()))
        middles = (limits + lower) / 2
        numbers = counts.numpy()
        self.writer.add_histogram_raw(
            tag,
            min=float(lower[first]),
            max=float(limits[last]),
            num=int(numbers.sum()),
            sum=float((numbers * middles).sum()),
            sum_squares=float((numbers * middles**2).sum()),
            bucket_limits=limits[first : last + 1].tolist(),
            bucket_counts=numbers[first : last + 1].tolist(),
            global_step=step,
        )


_CHANNEL_STD = Scale(-3, 3, "RdBu_r", "standard deviation", log=True)
_CHANNEL_MEAN = Scale(-3, 3, "RdBu_r", "standard deviations of the layer")


def tell(table: LayerTable, sample: Sample) -> str:
    """Return, as Markdown, the verdict so far, which layers were sick when, and the worst layer of each statistic."""
    step = table.last_step("train")
    lines = [f"**Step {step:,}.**", "", *(f"- {line.strip()}" for line in table.verdict())]
    episodes = table.episodes()
    if episodes:
        lines += ["", "| layer | what | since step | until | peak | limit |", "|---|---|---:|---:|---:|---:|"]
        lines += [
            f"| `{each.layer}` | {each.label} | {each.first:,} | {f'{each.last:,}' if each.recovered else ''} | "
            f"{each.peak:.4g} | {each.limit:g} |"
            for each in episodes[:_LISTED]
        ]
        if len(episodes) > _LISTED:
            lines += ["", f"and {len(episodes) - _LISTED} more."]
    lines += ["", "Worst layer of each statistic:", "", "| statistic | layer | value | limits |", "|---|---|---:|---|"]
    for statistic, layer, value in worst_layers(sample):
        limits = f"{statistic.low:g} to {statistic.high:g}" if statistic.low else f"up to {statistic.high:g}"
        lines.append(f"| {statistic.label} | `{layer}` | {value:.4g} | {limits} |")
    return "\n".join(lines)
