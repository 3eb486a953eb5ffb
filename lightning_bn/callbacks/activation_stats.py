"""ActivationStatsMonitor: what the activations and the statistics of every layer do, where a run is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_bn.activations.collector import LayerCollector
from lightning_bn.activations.episodes import Episode
from lightning_bn.activations.heatmap import Pixels, draw_grid
from lightning_bn.activations.layer_table import LayerTable, scalars
from lightning_bn.activations.layers import is_chosen, select_layers
from lightning_bn.activations.registry import STATISTICS
from lightning_bn.activations.sample import Sample
from lightning_bn.activations.tensorboard import TensorBoardReport
from lightning_bn.callbacks.both_lightnings import (
    Callback,
    LightningModule,
    TensorBoardLogger,
    Trainer,
)
from lightning_bn.callbacks.lightning_internals import logging_step
from lightning_bn.callbacks.synchronised import check_plugin_is_applied
from lightning_bn.choices import Choices, check_choices
from lightning_bn.layers.ledger import settle_together

__all__ = ["ActivationStatsMonitor"]

MAX_HISTOGRAMS = 32


class ActivationStatsMonitor(Callback):
    """Log what the activations of every layer are like and how far batch-norm statistics lag behind: which layer is
    sick, and since when.

    Training is looked at on every n-th optimizer step (all batches of that step together), validation and test over the
    whole epoch. Of each layer: mean, standard deviation (*unbiased, pooled* over batches, channels and ranks), greatest
    absolute value, share of zeros, dead channels, saturation, NaN and infinite values. Of each batch norm besides:
    drift, which is the distance between the batch and the running statistics before it, and the range of its affine
    parameters. Formulas: `ActivationStats`, `lightning_bn.activations.drift`.

    TensorBoard gets a few scalars over all layers, one heat map a statistic (layer x step), a text that names the sick
    layers, and a layout for the Custom Scalars tab; `lightning_bn.activations.tensorboard` lists the tags. Other
    loggers get the scalars. A CSV file of the whole table, ``activation_stats.csv``, lies beside the event files, and
    `table` gives the same rows. Training computes the same to the bit with and without this callback; steps at which a
    compiled model is looked at run without `torch.compile`.

    Functional activations (``F.relu(x)``) are no modules and can't be seen: use ``nn.ReLU()``, or name the module whose
    output they make. On several ranks activations are exact over all of them; drift is rank 0's, whose statistics DDP
    broadcasts and checkpoints save.

    Args:
        layers: None: batch-norm layers and activation functions. Else a name or pattern (``"layer4.*"``), a class, a
            function of name and module, or several of these.
        every_n_steps: how often training is looked at, in optimizer steps. None: the Trainer's ``log_every_n_steps``.
        scalars: ``"worst"``, a few numbers over all layers. ``"all"``, or patterns as for `layers`: those layers' own
            too.
        histograms: whether TensorBoard gets histograms of the activations of training, or of which layers; of at most
            32.
        heatmaps: whether to draw the heat maps (with matplotlib; they are redrawn each time the run has doubled, and at
            its end).
        gradients: whether to look at the gradients at the layers' outputs too, as backward has them: with a loss
            scaler, scaled.
        activations: False for drift and affine parameters only, which need no hook and no look at an activation.
        channel_dim: which dimension of an activation holds its channels: 1 as in (N, C, H, W), -1 as in (N, L, C). A
            batch norm's is 1.
        prefix: of the tags.

    Raises:
        ValueError: every_n_steps below 1; scalars neither "worst", "all" nor patterns.
        TypeError: layers that are none of these.

    Example:
        >>> import lightning.pytorch as pl
        >>> from lightning_bn import ActivationStatsMonitor
        >>> trainer = pl.Trainer(callbacks=[ActivationStatsMonitor()], logger=False, enable_checkpointing=False)
    """

    __module__ = "lightning_bn"

    def __init__(
        self,
        layers: Choices | None = None,
        *,
        every_n_steps: int | None = None,
        scalars: Literal["worst", "all"] | Choices = "worst",
        histograms: bool | Choices = False,
        heatmaps: bool = True,
        gradients: bool = False,
        activations: bool = True,
        channel_dim: int = 1,
        prefix: str = "activations",
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(
                f"ActivationStatsMonitor(every_n_steps={every_n_steps!r}): it is a number of optimizer steps, at least 1, as in "
                "every_n_steps=50; None takes the Trainer's log_every_n_steps."
            )
        if isinstance(scalars, bool) or scalars is None:
            raise ValueError(
                f'ActivationStatsMonitor(scalars={scalars!r}): it is "worst", "all", or patterns of layer names such as "layer4.*".'
            )
        if layers is not None:
            check_choices(f"ActivationStatsMonitor(layers={layers!r})", layers)
        self.layers = layers
        self.every_n_steps = every_n_steps
        self.scalars = scalars
        self.histograms = histograms
        self.heatmaps = heatmaps
        self.gradients = gradients
        self.activations = activations
        self.channel_dim = channel_dim
        self.prefix = prefix
        self._table = LayerTable()
        self._collectors: dict[str, LayerCollector] = {}
        self._reports: list[TensorBoardReport] = []
        self._newest = Sample()
        self._sampled_step: int | None = None
        self._told = False

    def table(self) -> list[dict[str, Any]]:
        """Return the table of the last run: a dict for each layer, stage and step.

        Keys are ``layer``, ``stage`` (``"train"``, ``"val"``, ``"test"``), ``step``, ``epoch``, then one for each
        statistic, None where it does not apply. ``pandas.DataFrame(monitor.table())`` makes a frame of it.
        """
        return self._table.rows()

    def episodes(self, stage: str | None = None) -> list[Episode]:
        """Return what was sick in the last run, of one stage or of all: layer, statistic, first and last step, peak, and
        whether it has recovered. The earliest and most upstream comes first, since that is the cause."""
        return self._table.episodes(stage)

    def ailments(self, stage: str = "train") -> list[Episode]:
        """Return the episodes of a stage that have not recovered."""
        return [episode for episode in self._table.episodes(stage) if not episode.recovered]

    def verdict(self) -> list[str]:
        """Return what the last run was like, in lines: what was sick, where first, since when and what to do; or that
        it was healthy."""
        return self._table.verdict()

    def __str__(self) -> str:
        return "\n".join(self.verdict())

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
                f"picture({statistic!r}, {stage!r}): there is no such row in the table; there are {', '.join(known) or 'none'}."
            )
        return draw_grid(grid)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        select_layers(nn.Identity(), self.layers)  # a choice that is none is told before anything runs
        self._collectors = {}
        self._reports = []
        self._sampled_step = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_plugin_is_applied(trainer, pl_module)
        last = self._table.last_step()
        if last is not None and logging_step(trainer) < last:
            self._table = LayerTable()  # another run
        settle_together(pl_module)
        self._collector(trainer, pl_module, "train")
        writers = [logger.experiment for logger in _tensorboards(trainer)] if trainer.is_global_zero else []
        self._reports = [TensorBoardReport(writer, prefix=self.prefix, heatmaps=self.heatmaps) for writer in writers]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        every = self.every_n_steps or trainer.log_every_n_steps
        step = logging_step(trainer)
        if self._sampled_step is None and every and step % every == 0:
            self._sampled_step = step
        if self._sampled_step is not None:
            self._collectors["train"].attach()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._sampled_step is None:
            return
        self._collectors["train"].detach()
        # The batches that one optimizer step accumulates are one sample.
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            step, self._sampled_step = self._sampled_step, None
            self._take(trainer, "train", step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._begin_evaluation(trainer, pl_module, "val")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._end_evaluation(trainer, "val")

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._collectors["val"].begin_batch()

    def on_test_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._collectors["test"].begin_batch()

    def on_before_zero_grad(self, *_: Any) -> None:
        # The forward of a closure is over; an optimizer may call the closure again within the batch.
        if self._sampled_step is not None:
            self._collectors["train"].begin_batch()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_evaluation(trainer, pl_module, "test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluation(trainer, "test")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        for collector in self._collectors.values():
            collector.close()
        self._draw()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for collector in self._collectors.values():
            collector.close()
        # They hold the model and the writers; the table is what a user comes back for.
        self._collectors = {}
        self._reports = []

    def _collector(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> LayerCollector:
        if stage not in self._collectors:
            layers = select_layers(pl_module, self.layers)
            if not layers and not self._told:
                self._told = True
                wanted = (
                    "batch-norm layer or activation function among its modules"
                    if self.layers is None
                    else f"module for {self.layers!r}"
                )
                rank_zero_warn(
                    f"ActivationStatsMonitor(layers={self.layers!r}) finds nothing to look at: {type(pl_module).__name__} has no {wanted}. "
                    "Name what it has, as in layers=nn.Conv2d or layers='encoder.*'; functional activations (F.relu) are no modules."
                )
            self._collectors[stage] = LayerCollector(
                pl_module,
                layers,
                training=stage == "train",
                activations=self.activations,
                gradients=self.gradients and stage == "train",
                histograms=self._histogram_layers(layers) if stage == "train" else (),
                channel_dim=self.channel_dim,
                step_is_forward=trainer.strategy.model is not pl_module,
            )
        return self._collectors[stage]

    def _histogram_layers(self, layers: dict[str, nn.Module]) -> list[str]:
        if isinstance(self.histograms, bool):
            chosen = list(layers) if self.histograms else []
        else:
            chosen = [name for name, module in layers.items() if is_chosen(self.histograms, name, module)]
        if len(chosen) > MAX_HISTOGRAMS:
            rank_zero_info(
                f"ActivationStatsMonitor: histograms of the first {MAX_HISTOGRAMS} of {len(chosen)} layers; pick others with "
                "histograms='layer4.*'."
            )
        return chosen[:MAX_HISTOGRAMS]

    def _begin_evaluation(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        collector = self._collector(trainer, pl_module, stage)
        collector.forget_channels()
        collector.attach()

    def _end_evaluation(self, trainer: Trainer, stage: str) -> None:
        self._collectors[stage].detach()
        self._take(trainer, stage, logging_step(trainer))

    def _take(self, trainer: Trainer, stage: str, step: int) -> None:
        collector = self._collectors[stage]
        sample = collector.collect(None if stage == "train" else self._collectors.get("train"))
        if not sample.layers:
            return
        self._tell_unseen(collector)
        self._table.append(stage, step, trainer.current_epoch, sample)
        tags = f"{self.prefix}" if stage == "train" else f"{self.prefix}_{stage}"
        numbers = {f"{tags}/{name}": value for name, value in scalars(sample, self._has_own_scalars(collector)).items()}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)
        if trainer.is_global_zero:
            for tensorboard in _tensorboards(trainer):
                directory = Path(tensorboard.log_dir)
                directory.mkdir(parents=True, exist_ok=True)
                self._table.append_csv(directory / "activation_stats.csv")
        if stage == "train":
            self._newest = sample
            for report in self._reports:
                report.update(self._table, sample, step)

    def _has_own_scalars(self, collector: LayerCollector) -> Any:
        if self.scalars == "worst":
            return None
        if self.scalars == "all":
            return lambda layer: True
        modules = {name: module for name, module in collector.layers.items() if is_chosen(self.scalars, name, module)}
        return lambda module: module in modules

    def _tell_unseen(self, collector: LayerCollector) -> None:
        unseen = collector.unseen()
        if unseen and not self._told:
            self._told = True
            rank_zero_warn(
                f"ActivationStatsMonitor sees nothing of {', '.join(unseen)}: no forward called them as modules. They are not part of this "
                "forward, or run inside compiled or scripted code that is not a module of the model's."
            )

    def _draw(self) -> None:
        step = self._table.last_step("train")
        for report in self._reports:
            if step is not None:
                report.draw(self._table, self._newest, step)


def _tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
