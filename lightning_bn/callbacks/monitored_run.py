"""The table of a monitored run: where it is written, and what is read of it afterwards."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, cast

from lightning_bn.activations.collector import LayerCollector
from lightning_bn.activations.description import describe_episodes, describe_statistics
from lightning_bn.activations.episodes import Episode
from lightning_bn.activations.heatmap import Pixels, draw_grid, plot_grid
from lightning_bn.activations.registry import STATISTICS
from lightning_bn.activations.report import Report
from lightning_bn.activations.sample import Sample
from lightning_bn.activations.sample_to_table import LayerTable, cut_csv, scalars
from lightning_bn.activations.tensor_to_moments import histogram_edges
from lightning_bn.activations.watched_layers import is_watched
from lightning_bn.callbacks.both_lightnings import Callback, Trainer
from lightning_bn.callbacks.loggers import directories, log_numbers
from lightning_bn.callbacks.run_journal import Moment, journal_of
from lightning_bn.callbacks.terminal import LastWords
from lightning_bn.choices import Choices
from lightning_bn.error_boundary import ErrorBoundary, theirs
from lightning_bn.grids import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = "activation_stats.csv"

# Samples of drift alone at consecutive steps are evaluated together: what is done for one costs more than a tenth of a
# small step. After a kill these are missing.
MAX_WAITING = 16
MAX_SECONDS = 2.0


class MonitoredRun(Callback):
    """The table of a run, and what follows from it: what was sick, the verdict, the pictures."""

    _boundary: ErrorBoundary
    prefix: str
    scalars: Literal["worst", "all"] | Choices
    on_episode: Callable[[Episode], object] | None

    def __init__(self) -> None:
        super().__init__()
        self.histograms: bool | Choices = False
        self.verbose = True
        self._catch_up: Callable[[], object] = _nothing  # takes in the samples that wait
        self._waiting: list[Moment] = []
        self._waiting_since = 0.0
        self._table = LayerTable()
        self._report = Report([])
        self._newest = Sample()  # of training
        self._is_described = False  # in the journal, what the statistics mean
        self._is_fresh = True  # whether the table is that of a new run
        self._first_step: int | None = None  # at which the fit began, or goes on from a checkpoint

    @property
    def _table(self) -> LayerTable:
        """Whoever reads the table finds in it the samples that were waiting."""
        self._catch_up()
        return self._taken

    @_table.setter
    def _table(self, table: LayerTable) -> None:
        self._taken = table

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
        return draw_grid(self._grid("picture", statistic, stage), STATISTICS[statistic])

    def plot(self, statistic: str = "std", stage: str = "train") -> tuple[Figure, Axes]:
        """Draw the heat map of a statistic over the whole run, layer x step, and return the figure and its axes, as
        torchmetrics' ``plot`` does.

        Raises:
            ValueError: a statistic that is not summed up over layers, or that no layer has.
        """
        axes = plot_grid(self._grid("plot", statistic, stage), STATISTICS[statistic])
        return cast("Figure", axes.figure), axes

    def _grid(self, method: str, statistic: str, stage: str) -> Grid:
        grid = self._table.grid(stage, statistic) if statistic in STATISTICS else None
        if grid is None or not grid.layers:
            known = [name for name in STATISTICS if self._table.grid(stage, name).layers]
            raise ValueError(
                f"{method}({statistic!r}, {stage!r}): there is no such row in the table; there are "
                f"{', '.join(known) or 'none'}."
            )
        return grid

    def _keep(self, trainer: Trainer, collector: LayerCollector, moment: Moment, *, is_last: bool) -> None:
        """Let a sample wait for the next one, unless it is the last of several, or they have waited long enough."""
        if not self._waiting:
            self._waiting_since = monotonic()
            self._catch_up = partial(self._boundary.attempt, "", self._record_kept, trainer, collector)
        collector.keep()
        self._waiting.append(moment)
        if is_last or len(self._waiting) >= MAX_WAITING or monotonic() - self._waiting_since > MAX_SECONDS:
            self._catch_up()

    def _record_kept(self, trainer: Trainer, collector: LayerCollector) -> None:
        self._catch_up = _nothing
        moments, self._waiting = self._waiting, []
        self._record(trainer, "train", collector, moments, collector.kept.collect())

    def _record(
        self,
        trainer: Trainer,
        stage: str,
        collector: LayerCollector,
        moments: Sequence[Moment],
        samples: Sequence[Sample],
    ) -> None:
        """Tell of samples of one stage."""
        newest, step = samples[-1], moments[-1].step
        if not newest.layers:
            return
        tags = self.prefix if stage == "train" else f"{self.prefix}_{stage}"
        own, begun = self._has_own_scalars(collector) if trainer.loggers else None, []
        for moment, sample in zip(moments, samples, strict=True):
            begun += self._table.append(stage, moment.step, moment.epoch, sample)
            if trainer.loggers:
                found = scalars(sample, own, self._table.places())
                numbers = {f"{tags}/{name}": value for name, value in found.items()}
                for logger in trainer.loggers:
                    part = f"its numbers in {type(logger).__name__}"
                    self._boundary.attempt(part, log_numbers, logger, numbers, moment.step)
        if trainer.is_global_zero:
            self._boundary.attempt(f"the table {FILE}", self._write, trainer, len(samples))
        if stage == "train":
            self._newest = newest
            self._update_report(trainer, step)
        self._write_journal(trainer, stage, moments, samples)
        if self.on_episode is not None and trainer.is_global_zero:
            with theirs():
                for episode in begun:
                    self.on_episode(episode)

    def _has_own_scalars(self, collector: LayerCollector) -> Any:
        if self.scalars == "worst":
            return None
        if self.scalars == "all":
            return lambda layer: True
        modules = {name: module for name, module in collector.layers.items() if is_watched(self.scalars, name, module)}
        return lambda module: module in modules

    def _write(self, trainer: Trainer, newest: int) -> None:
        for directory in directories(trainer):
            directory.mkdir(parents=True, exist_ok=True)
            if self._is_fresh and self._first_step is not None:
                cut_csv(directory / FILE, self._first_step)
            self._table.append_csv(directory / FILE, newest)
        self._is_fresh = False

    def _describe(self, trainer: Trainer) -> None:
        if self._is_described:
            return
        self._is_described = True
        edges = histogram_edges().tolist() if self.histograms else []
        journal_of(trainer).journal.write_once("statistics", statistics=describe_statistics(), histogram_edges=edges)

    def _write_journal(
        self, trainer: Trainer, stage: str, moments: Sequence[Moment], samples: Sequence[Sample]
    ) -> None:
        run = journal_of(trainer)
        if run.journal.path is None:
            return
        self._describe(trainer)
        for moment, sample in zip(moments, samples, strict=True):
            run.sample(stage, moment, sample)
            run.channels(stage, moment.step, self._table.samples(stage), sample)
        run.episodes(trainer, describe_episodes(self._table.episodes()))

    def _update_report(self, trainer: Trainer, step: int | None = None) -> None:
        """Tell loggers of the newest training sample, taken at `step`; None: the run is over."""
        take = self._report.finish if step is None else self._report.update
        step = self._table.last_step("train") if step is None else step
        if step is not None:
            is_faulty = journal_of(trainer).has_mistake
            part = "pictures and texts"
            self._boundary.attempt(part, take, self._table, self._newest, step, has_mistake=is_faulty)

    def _last_words(self, trainer: Trainer) -> LastWords | None:
        self._update_report(trainer)  # with the mistakes that were found after the last batch
        self._report = Report([])  # which holds writers
        return LastWords(0, self.verdict()) if self.verbose and self._table.last_step() is not None else None


def _nothing() -> None:
    """No sample waits."""
