"""ActivationStatsMonitor: what the activations and the statistics of every layer do, where a run is looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_bn.activations.call_sites import interval_at
from lightning_bn.activations.collector import LayerCollector
from lightning_bn.activations.episodes import Episode
from lightning_bn.activations.report import Report
from lightning_bn.activations.sample_to_table import LayerTable
from lightning_bn.activations.watched_layers import is_watched, select_layers
from lightning_bn.callbacks.arguments import stable_text
from lightning_bn.callbacks.blindness import Blindness
from lightning_bn.callbacks.both_lightnings import (
    LightningModule,
    Trainer,
    logging_interval,
)
from lightning_bn.callbacks.lightning_internals import data_parallel_group, logging_step
from lightning_bn.callbacks.loggers import needs_pictures, sinks
from lightning_bn.callbacks.monitored_run import MonitoredRun
from lightning_bn.callbacks.observing import boundary_of, meet, meeting, observing
from lightning_bn.callbacks.run_journal import Moment, journal_of
from lightning_bn.callbacks.synchronisation import check_plugin_is_applied
from lightning_bn.choices import Choices, check_choices
from lightning_bn.layers.deferred import settle_together
from lightning_bn.ranks.collective import Ranks

MAX_HISTOGRAMS = 32


@observing
class ActivationStatsMonitor(MonitoredRun):
    """Name the layer that is sick, since when, and what to do, from the activations of every layer, the model's input,
    and how far batch-norm statistics lag behind.

    Training is looked at on some optimizer steps (all batches of such a step together), validation and test on some
    batches, together. For each call site of a layer it measures mean, standard deviation (*unbiased, pooled* over
    batches, channels and ranks), range, share of zeros, dead channels, saturation, NaN and infinite values. For each
    batch norm also drift, the distance between the batch and the running statistics before it, and the range of its
    affine parameters. Formulas: `ActivationStats`, `lightning_bn.activations.drift`.

    A value beyond its limits is an illness, and the time it lasts an `Episode`. The verdict at the end names the cause
    of each: the earliest and most upstream one. What the start of training explains is not an illness: running
    statistics that began with 0/1, and batch norms whose weight began with 0. Loggers get a few scalars over all
    layers, and what else they can show. A CSV file of the whole table, ``activation_stats.csv``, is next to each
    logger's files, or else in ``default_root_dir``; `table` returns the same rows. Training and evaluation are
    bit-identical with and without this callback; a compiled model runs without `torch.compile` at sampled steps.

    Functional activations (``F.relu(x)``, ``x.tanh()``) and residual sums are rows too, named by the module that calls
    them: ``layer1.0:relu[1]``, ``layer1.0:add[1]``. Attention and encoder layers of torch's that are in eval mode as a
    batch begins are left to its fused kernels, which round differently: by default neither their parts nor, in such a
    model, functions are looked at then; modules that `layers` names are. On several ranks activations are exact over
    all of them; drift is rank 0's, whose statistics DDP broadcasts and checkpoints save.

    Args:
        layers: None: norms (batch, layer, group, RMS) and activation functions, modules or not. Else a name or pattern
            (``"layer4.*"``), a class, a function of name and module, or several of these.
        every_n_steps: how often training is looked at, in optimizer steps; evaluations are then looked at in all of
            their batches. None: at every step at first, and half as often after every 16 samples, until it is the
            Trainer's ``log_every_n_steps``; evaluations likewise, after every 4 batches.
        scalars: ``"worst"``, a few numbers over all layers. ``"all"``, or patterns as for `layers`: those layers' own
            too.
        histograms: whether TensorBoard gets histograms of the activations of training, or of which layers; of at most
            32.
        heatmaps: whether to draw the heat maps (with matplotlib), at the end of a run and where something new is sick.
            None: not where TensorBoard has the page, which shows the same (extra ``dashboard``).
        gradients: whether to look at the gradients at the layers' outputs too, as backward has them (with a loss
            scaler, scaled), and at how far a step moves each layer with parameters; this copies the weights.
        effective_rank: whether to measure it, or of which layers: a C x C matrix a layer, in float64.
        activations: False for drift and affine parameters only, which need no hook and no look at an activation.
        channel_dim: which dimension of an activation holds its channels: 1 as in (N, C, H, W), -1 as in (N, L, C).
            None: as the layers around it tell. A batch norm's is 1.
        prefix: of the tags.
        verbose: whether to print the verdict at the end of a fit, a validation and a test.
        on_episode: called on rank 0 with each `Episode` as it begins, to send an alert; its errors end the fit.
        process_group: the ranks whose activations are taken together. None: all, or under tensor parallelism those that
            see different data.

    Raises:
        ValueError: every_n_steps below 1; scalars neither "worst", "all" nor patterns.
        TypeError: layers, scalars, histograms or an effective_rank that are none of these; an on_episode that can't be
            called.

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
        heatmaps: bool | None = None,
        gradients: bool = False,
        effective_rank: bool | Choices = False,
        activations: bool = True,
        channel_dim: int | None = None,
        prefix: str = "activations",
        verbose: bool = True,
        on_episode: Callable[[Episode], object] | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(
                f"ActivationStatsMonitor(every_n_steps={every_n_steps!r}): it is a number of optimizer steps, at least "
                "1, as in every_n_steps=50; None takes the Trainer's log_every_n_steps."
            )
        if isinstance(scalars, bool) or scalars is None:
            raise ValueError(
                f'ActivationStatsMonitor(scalars={scalars!r}): it is "worst", "all", or patterns of layer names such '
                f'as "layer4.*".'
            )
        if layers is not None:
            check_choices(f"ActivationStatsMonitor(layers={layers!r})", layers)
        for name, choices in (("scalars", scalars), ("histograms", histograms), ("effective_rank", effective_rank)):
            if not isinstance(choices, bool):
                check_choices(f"ActivationStatsMonitor({name}={choices!r})", choices)
        if on_episode is not None and not callable(on_episode):
            raise TypeError(
                f"ActivationStatsMonitor(on_episode={on_episode!r}): it is a function of an Episode, as in "
                "on_episode=lambda episode: print(episode, episode.advice)."
            )
        self.layers = layers
        self.every_n_steps = every_n_steps
        self.scalars = scalars
        self.histograms = histograms
        self.heatmaps = heatmaps
        self.gradients = gradients
        self.effective_rank = effective_rank
        self.activations = activations
        self.channel_dim = channel_dim
        self.prefix = prefix
        self.verbose = verbose
        self.on_episode = on_episode
        self.process_group = process_group
        self._boundary = boundary_of("ActivationStatsMonitor", self._close)
        self._collectors: dict[str, LayerCollector] = {}
        self._sampled_step: int | None = None
        self._ranks: Ranks | None = None
        self._blindness = Blindness()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._ranks = None
        select_layers(nn.Identity(), self.layers)  # a choice that is none is told before anything runs
        self._collectors = {}
        self._report = Report([])
        self._sampled_step = self._first_step = None
        self._blindness = Blindness()
        self._is_described = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_plugin_is_applied(trainer, pl_module)
        last = self._table.last_step()
        if last is not None and logging_step(trainer) < last:
            self._table, self._is_fresh = LayerTable(), True  # another run
        settle_together(pl_module)
        self._collector(trainer, pl_module, "train")
        where = sinks(trainer.loggers, self.prefix) if trainer.is_global_zero else []
        drawn = needs_pictures(trainer.loggers) if self.heatmaps is None else self.heatmaps
        self._report = Report(where, prefix=self.prefix, heatmaps=drawn)
        journal_of(trainer).begin(trainer, pl_module)
        journal_of(trainer).before_end.append(lambda: self._catch_up())
        self._describe(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        journal_of(trainer).epoch(trainer)

    @meeting
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = logging_step(trainer)
        if self._first_step is None:
            self._first_step = step
        if self._sampled_step is None and self._is_due(trainer, step):
            self._sampled_step = step
        if self._sampled_step is not None:
            self._boundary.attempt("", lambda: self._collectors["train"].attach())

    def _is_due(self, trainer: Trainer, step: int) -> bool:
        longest = logging_interval(trainer)
        if self.every_n_steps is not None:
            return step % self.every_n_steps == 0
        return bool(longest) and step % interval_at(step, longest) == 0

    @meeting
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._sampled_step is None:
            return
        # The batches that one optimizer step accumulates are one sample.
        is_complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        self._boundary.attempt("", self._rest, trainer, is_complete)
        if is_complete:
            step, self._sampled_step = self._sampled_step, None
            meet(self._boundary, self._together(trainer), self._take, trainer, "train", step)

    def _rest(self, trainer: Trainer, is_complete: bool) -> None:
        collector = self._collectors["train"]
        if trainer.is_last_batch or (is_complete and not self._is_due(trainer, logging_step(trainer) + 1)):
            collector.detach()
        else:
            collector.pause()
        journal_of(trainer).modes(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._begin_evaluation(trainer, pl_module, "val")

    @meeting
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            meet(self._boundary, self._together(trainer), self._end_evaluation, trainer, "val")
            self._boundary.attempt("", lambda: journal_of(trainer).validation(trainer))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if not trainer.sanity_checking:
            self._begin_evaluation_batch(trainer, "val", batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._begin_evaluation_batch(trainer, "test", batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.gradients and self._sampled_step is not None:
            self._collectors["train"].before_step(each for group in optimizer.param_groups for each in group["params"])

    def on_before_zero_grad(self, *_: Any) -> None:
        # The forward of a closure is over; an optimizer may call the closure again within the batch.
        if self._sampled_step is not None:
            self._collectors["train"].begin_batch()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_evaluation(trainer, pl_module, "test")

    @meeting
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        meet(self._boundary, self._together(trainer), self._end_evaluation, trainer, "test")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not at the first sample: a part may be used later in the epoch.
        self._tell_blindness(trainer, "train")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._update_report(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()
        self._update_report(trainer)
        journal_of(trainer).end(trainer, type(exception).__name__)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()
        journal_of(trainer).end(trainer)
        # They hold the model; the table is what a user comes back for.
        self._collectors = {}

    def _close(self) -> None:
        try:
            self._catch_up()
        finally:
            for collector in self._collectors.values():
                collector.close()

    @property
    def state_key(self) -> str:
        """Two monitors of one Trainer have a state each."""
        return self._generate_state_key(prefix=self.prefix, layers=stable_text(self.layers))

    def state_dict(self) -> dict[str, Any]:
        return self._table.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        last, step = self._table.last_step(), state_dict["step"]
        if last is None or step is None or last > step:
            self._table, self._is_fresh = LayerTable(), True
            self._table.load_state_dict(state_dict)

    def _collector(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> LayerCollector:
        if stage not in self._collectors:
            layers = select_layers(pl_module, self.layers)
            if not layers and self.layers is not None:
                self._blindness.of_all(pl_module, self.layers, stage)
            self._collectors[stage] = LayerCollector(
                pl_module,
                layers,
                training=stage == "train",
                activations=self.activations,
                gradients=self.gradients and stage == "train",
                histograms=self._histogram_layers(layers) if stage == "train" else (),
                ranked=None if self.effective_rank is True else self._chosen(self.effective_rank, layers),
                channel_dim=self.channel_dim,
                functions=self.layers is None,
                step_is_forward=trainer.strategy.model is not pl_module,
                ranks=self._together(trainer),
                boundary=self._boundary,
            )
        return self._collectors[stage]

    def _together(self, trainer: Trainer) -> Ranks:
        if self._ranks is None:
            self._ranks = Ranks(self.process_group or data_parallel_group(trainer), task="ActivationStatsMonitor")
        return self._ranks

    def _histogram_layers(self, layers: dict[str, nn.Module]) -> list[str]:
        chosen = list(layers) if self.histograms is True else self._chosen(self.histograms, layers)
        if len(chosen) > MAX_HISTOGRAMS:
            rank_zero_info(
                f"ActivationStatsMonitor: histograms of the first {MAX_HISTOGRAMS} of {len(chosen)} layers; pick "
                "others with histograms='layer4.*'."
            )
        return chosen[:MAX_HISTOGRAMS]

    @staticmethod
    def _chosen(choices: bool | Choices, layers: dict[str, nn.Module]) -> list[str]:
        if isinstance(choices, bool):
            return []
        return [name for name, module in layers.items() if is_watched(choices, name, module)]

    def _begin_evaluation(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if "train" in self._collectors:
            self._collectors["train"].detach()
        collector = self._collector(trainer, pl_module, stage)
        collector.forget_channels()
        collector.attach()

    def _begin_evaluation_batch(self, trainer: Trainer, stage: str, batch_idx: int) -> None:
        interval = 1 if self.every_n_steps is not None else interval_at(batch_idx, logging_interval(trainer) or 1, 4)
        if batch_idx % interval == 0:
            self._collectors[stage].attach()
        else:
            self._collectors[stage].detach()

    def _end_evaluation(self, trainer: Trainer, stage: str) -> None:
        self._collectors[stage].detach()
        self._take(trainer, stage, logging_step(trainer))
        self._tell_blindness(trainer, stage)

    def _take(self, trainer: Trainer, stage: str, step: int) -> None:
        collector, moment = self._collectors[stage], Moment.of(trainer, stage, step)
        if stage != "train" or self.on_episode is not None or not collector.can_keep:
            sample = collector.collect(None if stage == "train" else self._collectors.get("train"))
            self._record(trainer, stage, collector, [moment], [sample])
            return
        is_next = not trainer.is_last_batch and self._is_due(trainer, step + 1)
        self._keep(trainer, collector, moment, is_last=not is_next)

    def _tell_blindness(self, trainer: Trainer, stage: str) -> None:
        """Warn of the layers of which nothing is seen, of each once a stage."""
        collector = self._collectors.get(stage)
        if collector is None:
            return
        if not collector.layers and not collector.sees_functions:
            self._blindness.of_all(trainer.lightning_module, self.layers, stage)
        norms = {} if self.layers is not None else self._blindness.of_norms(trainer.lightning_module)
        found = norms | self._blindness.of_layers(collector, stage, is_sampled=bool(self._table.samples(stage)))
        journal_of(trainer).unseen(trainer, stage, found)
