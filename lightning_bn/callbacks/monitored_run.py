"""What is read of a monitored run afterwards."""

from __future__ import annotations

import html
from typing import Any

from lightning_bn.activations.episodes import Episode
from lightning_bn.activations.heatmap import Pixels, draw_grid
from lightning_bn.activations.registry import STATISTICS
from lightning_bn.activations.sample_to_table import LayerTable
from lightning_bn.callbacks.both_lightnings import Callback


class MonitoredRun(Callback):
    """The table of a run, and what follows from it: what was sick, the verdict, the pictures."""

    def __init__(self) -> None:
        super().__init__()
        self._table = LayerTable()

    def table(self) -> list[dict[str, Any]]:
        """Return the table of the last run: a dict for each layer, stage and step.

        Keys are ``layer``, ``stage`` (``"train"``, ``"val"``, ``"test"``), ``step``, ``epoch``, then one for each
        statistic, None where it does not apply. ``pandas.DataFrame(monitor.table())`` makes a frame of it.
        """
        return self._table.rows()

    def episodes(self, stage: str | None = None) -> list[Episode]:
        """Return what was sick in the last run, of one stage or of all: layer, statistic, first and last step, peak,
        and whether it has recovered. The earliest and most upstream comes first, since that is the cause."""
        return self._table.episodes(stage)

    def ailments(self, stage: str = "train") -> list[Episode]:
        """Return the episodes of a stage that have not recovered."""
        return [episode for episode in self._table.episodes(stage) if not episode.recovered]

    def verdict(self) -> list[str]:
        """Return what the last run was like, in lines: what was sick, where first, since when and what to do; or that
        it was healthy."""
        return self._table.verdict()

    def __str__(self) -> str:
        """The verdict; before the first sample, of which there is none, the call."""
        return repr(self) if self._table.last_step() is None else "\n".join(self.verdict())

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def picture(self, statistic: str, stage: str = "train") -> Pixels:
        """Return the heat map of a statistic over the whole run, layer x step, as TensorBoard gets it: (height, width,
        3) uint8.

        Raises:
            ValueError: a statistic that is not summed up over layers, or that no layer has.
        """
        grid = self._table.grid(stage, statistic) if statistic in STATISTICS else None
        if grid is None or not grid.layers:
            known = [name for name in STATISTICS if self._table.grid(stage, name).layers]
            raise ValueError(
                f"picture({statistic!r}, {stage!r}): there is no such row in the table; there are "
                f"{', '.join(known) or 'none'}."
            )
        return draw_grid(grid, STATISTICS[statistic])
