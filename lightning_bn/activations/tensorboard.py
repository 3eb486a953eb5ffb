"""What this package writes into TensorBoard; the only file that knows a SummaryWriter.

Tags, with the default prefix, and ``activations_val``, ``activations_test`` in its place for those stages' scalars:

| tag | what |
|---|---|
| ``activations/<statistic>/worst``, ``/median`` | scalar: the layer farthest from healthy; the median over layers |
| ``activations/<statistic>/worst_layer`` | scalar: the number of that layer in the text ``activations/rows`` |
| ``activations/<scale>/smallest``, ``/largest`` | scalar, of `std` and `grad_std`, which can be sick on either side |
| ``activations/<statistic>/<layer>`` | scalar, for the layers asked for |
| ``activations_map/01_<statistic>`` | image: layer x step, numbered in the order in which to read them |
| ``activations_map/09_channel_std``, ``/10_channel_mean`` | image: each layer's spread over channels, newest sample |
| ``activations/layers`` | text: the verdict so far, which layers were sick when, the worst of each statistic |
| ``activations/rows`` | text: the number of each layer |
| ``activations_histogram/<layer>`` | histogram, for the layers asked for |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_bn.activations.column import Statistic
from lightning_bn.activations.heatmap import Pixels
from lightning_bn.activations.registry import STATISTICS
from lightning_bn.activations.tensor_to_moments import histogram_edges

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def layout(prefix: str) -> dict[str, dict[str, list[Any]]]:
    """Return the layout of the Custom Scalars tab: a chart for each statistic that has one, for training and for
    validation.

    All lines of a run have one colour, so each chart is a line and an edge of a band around it, which can be told
    apart: the median within the smallest and the largest, or the worst with the median below it.
    """

    def chart(statistic: Statistic, stage: str) -> list[Any]:
        # A margin chart takes exactly three tags, by name: the line, then the lower and the upper edge.
        lines = ("median", "smallest", "largest") if statistic.band else ("worst", "median", "worst")
        return ["Margin", [f"{stage}/{statistic.name}/{which}" for which in lines]]

    return {
        f"Batch norm, {title}": {
            each.chart: chart(each, stage) for each in STATISTICS.values() if each.chart is not None
        }
        for title, stage in (("training", prefix), ("validation", f"{prefix}_val"))
    }


def add_numbers(writer: SummaryWriter, numbers: Mapping[str, float], step: int) -> bool:
    """Write scalars by tag, all in one event, which takes a tenth of the time of one each; tell whether that could be
    done: a writer that was closed, or another package's, takes none."""
    events = getattr(writer, "file_writer", None)
    if events is None or type(writer).__module__ != "torch.utils.tensorboard.writer":
        return False
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
    events.add_summary(Summary(value=values), step)
    return True


def add_markdown(writer: SummaryWriter, tag: str, text: str, step: int) -> None:
    """Write `text`, Markdown, to the Text tab."""
    writer.add_text(tag, text, step)


class TensorBoardSink:
    """A report's place in one event file.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`.
        prefix: of all tags, for the layout of the Custom Scalars tab.
    """

    def __init__(self, writer: SummaryWriter, prefix: str = "activations") -> None:
        self.writer = writer
        writer.add_custom_scalars(layout(prefix))

    def image(self, tag: str, pixels: Pixels, step: int) -> None:
        self.writer.add_image(tag, pixels, step, dataformats="HWC")

    def text(self, tag: str, markdown: str, step: int) -> None:
        add_markdown(self.writer, tag, markdown, step)

    def histogram(self, tag: str, counts: Tensor, step: int) -> None:
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
