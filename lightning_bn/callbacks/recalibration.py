"""Recalibrated statistics at the right moment of a fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_bn.callbacks.batch_input import BatchInput
from lightning_bn.callbacks.both_lightnings import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    take_turn_after_weight_averaging,
)
from lightning_bn.callbacks.checkpoint_files import check_kinds, files_of, statistics_in, write_recalibrated_copy
from lightning_bn.callbacks.evaluated_weights import EvaluatedWeights
from lightning_bn.callbacks.lightning_internals import data_parallel_group, logging_step, why_no_second_pass
from lightning_bn.callbacks.observing import begin_together, boundary_of, check_logged, meeting, not_logged, observing
from lightning_bn.callbacks.recalibrated_sets import LearningLayers, Sources
from lightning_bn.callbacks.recalibration_messages import (
    check_arguments,
    check_fit,
    log_report,
    what_is_missing,
    what_was_repaired,
    why_none_learns,
)
from lightning_bn.callbacks.run_journal import journal_of
from lightning_bn.callbacks.synchronisation import check_plugin_is_applied
from lightning_bn.callbacks.terminal import LastWords
from lightning_bn.callbacks.training_pass import on_training_device, quiet, validate_once_more
from lightning_bn.comparison.scores import Scores
from lightning_bn.ranks.collective import Ranks
from lightning_bn.recalibration import recalibrate
from lightning_bn.recalibration.report import RecalibrationReport
from lightning_bn.recalibration.selection import not_supported
from lightning_bn.recalibration.spread import keep_spread
from lightning_bn.recalibration.spread_pass import with_spread


@observing
class BatchNormRecalibration(Callback):
    """Re-estimate the running statistics from training batches with the current weights, by `lightning_bn.recalibrate`.

    It recalibrates the layers that were learning: those that keep running statistics, are not frozen (some
    parameter requires grad) and were in training mode in the last training step. It takes no step, logs no training
    metric, and leaves the weights, the gradients, ``global_step``, the RNG, torchmetrics and the running loader as they
    are. Whatever the order in ``Trainer(callbacks=...)``, it acts after `WeightAveraging`, `EMAWeightAveraging` and
    `StochasticWeightAveraging` have put their weights in and before `ModelCheckpoint` saves. Where anybody else puts
    other weights in after its turn, it acts on those, before the first batch of the validation or when the fit ends.
    Where it can't (an exchange around each batch, inside a step, in a test or prediction), it says so.

    Args:
        when: "fit_end", once, after the last training step. "validation", before the validations of a fit, except the
            sanity check: the precise statistics are then validated and checkpointed, and training continues to average
            from them.
        every_n_epochs: with ``when="validation"``, only in every n-th epoch.
        num_batches: training batches to look at, at most; None for all.
        tolerance: stop when the standard error of every layer's mean, in units of its standard deviation, is below it,
            after 8 batches at the soonest. These are few images where batches are small, and can cost accuracy.
        exact: the statistics of the network as it runs at inference, in the memory of all batches' activations; see
            `recalibrate`.
        spread: the layers also keep how much one image's moments differ from another's, for `DriftMonitor` and
            `lightning_bn.drift`, which takes one more pass. Augmented images, and those that the network was trained
            on, are other data than live images: give data like those that will come as `dataloader`.
        dataloader: where the batches come from; None for the Trainer's training data, with its samplers and
            ``limit_train_batches``.
        sets: by the name of a set of the module's `StatisticsSets`, the loader of its batches, or None for the
            Trainer's training data; the report names a layer ``bn1@night``.
        forward: ``forward(module, batch)`` runs a batch, on the module's device, through the module. None: the module's
            ``forward`` where the batch fits it, else its ``training_step``, without grad and with logging muted.
        monitor: a metric that validation logs. The validation set is then evaluated before and after, and the new
            statistics are kept only if it improved.
        mode: "min" where a small `monitor` is good, "max" where a large one is.
        checkpoints: "best", "last" or both: after the fit, each such file gets a recalibrated copy next to it,
            ``<name>-recalibrated.ckpt``. Not under strategies that spread the parameters over ranks.
        process_group: the ranks whose data is taken together. None: all, or under tensor parallelism those that see
            different data.

    Attributes:
        report: the `RecalibrationReport` of the last recalibration, None before the first.
        kept: whether the last recalibration was kept; always True without `monitor`.

    Raises:
        ValueError, TypeError: an invalid argument.
        MisconfigurationException: at the start of the fit, where the module, its data or the checkpoints can't be used.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import EMAWeightAveraging
        >>> from lightning_bn import BatchNormRecalibration
        >>> recalibration = BatchNormRecalibration(when="validation", num_batches=100)
        >>> callbacks = [EMAWeightAveraging(use_buffers=False), recalibration]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False)

    References:
        Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3.2 (precise batch norm); Izmailov et al. 2018,
        "Averaging Weights Leads to Wider Optima and Better Generalization", section 3.2 (statistics of averaged
        weights).
    """

    __module__ = "lightning_bn"

    def __init__(
        self,
        *,
        when: Literal["fit_end", "validation"] = "fit_end",
        every_n_epochs: int = 1,
        num_batches: int | None = 200,
        tolerance: float | None = None,
        exact: bool = False,
        spread: bool = False,
        dataloader: Any = None,
        sets: Mapping[str, Any] | None = None,
        forward: Callable[[LightningModule, Any], Any] | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        checkpoints: Sequence[Literal["best", "last"]] = (),
        process_group: Any = None,
    ) -> None:
        check_arguments(when, every_n_epochs, num_batches, tolerance, exact, dataloader, checkpoints)
        self.when, self.every_n_epochs = when, every_n_epochs
        self.num_batches, self.tolerance = num_batches, tolerance
        self.exact, self.spread = exact, spread
        self.dataloader, self.sets = dataloader, sets
        self._sources = Sources(dataloader, sets, spread=spread)
        self.forward = forward
        self.monitor, self.mode = monitor, mode
        self.checkpoints = tuple(checkpoints)
        self.process_group = process_group
        self.report: RecalibrationReport | None = None
        self.kept = True
        self._boundary = boundary_of("BatchNormRecalibration")
        self._weights = EvaluatedWeights(self._boundary)
        self._moment: float | None = None  # of the last recalibration of this fit
        self._saved: float | None = None  # when the last checkpoint was made, whoever keeps it
        self._scores = Scores(monitor or "monitor", mode)
        self._count = 0
        self._last_step: int | None = None
        self._input = self._new_input()
        self._layers = LearningLayers()
        self._final = False
        self._at_first = False  # whether the batch of an evaluation is its first
        self._ranks: Ranks | None = None

    @property
    def state_key(self) -> str:
        # One callback for validations and another for the end of the fit may stand side by side.
        return self._generate_state_key(when=self.when)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._ranks = None
        if self.spread:
            keep_spread(pl_module)  # a checkpoint to resume from may hold one
        if stage == "fit":
            take_turn_after_weight_averaging(trainer, self)
        else:
            if not self._weights.are_known(pl_module):
                self._weights.remember(pl_module)
            self._weights.remember_when_loaded(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_plugin_is_applied(trainer, pl_module)
        self._final, self._layers = False, LearningLayers()
        self._input, self._weights = self._new_input(), EvaluatedWeights(self._boundary)
        self._moment = self._saved = None
        check_fit(trainer, pl_module, forward=self.forward, monitor=self.monitor)
        self._sources.check(pl_module)
        check_kinds(trainer, self.checkpoints)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is not None:
            check_logged("BatchNormRecalibration", self.monitor, trainer.callback_metrics)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        journal_of(trainer).begin(trainer, pl_module)
        self._layers.look(pl_module)
        if self._sources.are_given:
            for name in self._sources.names:
                with self._sources.batches(trainer, pl_module, name) as batches:
                    self._input.learn_from(trainer, pl_module, batches)
        elif self.when == "validation" and (reason := why_no_second_pass(trainer)):
            raise MisconfigurationException(
                f"BatchNormRecalibration(when='validation'): the training loader {reason}. Give it a loader of its "
                "own, of a data set of its own: BatchNormRecalibration(dataloader=...)."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._weights.forget()
        # A batch that does not go in must be known now, not when the training is over.
        if not self._sources.are_given and not self._input.known and batch is not None:
            with quiet(trainer, pl_module):
                self._input.learn_from(trainer, pl_module, iter([batch]))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layers.look(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._layers.note_modes()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._weights.are_known(pl_module):
            self._weights.remember(pl_module)  # the statistics are training's own

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._weights.stop_waiting()

    on_test_start = on_predict_start = on_validation_start

    @meeting
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if self.when == "validation" and due and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            act = self._weights.expect if self._weights.come_late else partial(self._act, trainer, pl_module)
            begin_together(self._boundary, self._together(trainer), act)

    @meeting
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._at_first = batch_idx == dataloader_idx == 0
        act = partial(self._act_on_others, trainer, pl_module)
        self._at_batch(trainer, self._weights.begin_batch, trainer, pl_module, batch_idx, dataloader_idx, act)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    @meeting
    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        self._at_batch(trainer, self._weights.tell_of_others, trainer, pl_module, self._together(trainer))

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    @meeting
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "fit_end":
            begin_together(self._boundary, self._together(trainer), partial(self._act, trainer, pl_module))

    @meeting
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        begin_together(self._boundary, self._together(trainer), partial(self._end_fit, trainer, pl_module))

    def _end_fit(self, trainer: Trainer, module: LightningModule) -> None:
        def files() -> list[Path]:
            if not self._layers.found:  # nothing was trained in a fit that was resumed at its end
                self._layers.look(module)
            return files_of(trainer, self.checkpoints if self._layers.names else ())

        written = self._together(trainer).each(files)
        with on_training_device(trainer, module):
            # A fit resumed from a checkpoint with no step left to train ends without on_train_end.
            if self.when == "fit_end" and 0 < trainer.global_step != self._last_step:
                self._act(trainer, module)
            self._act_on_others(trainer, module)  # which the module's own on_train_end, that came later, may put in
            again = partial(self._recalibrate, trainer, module)
            for path in written:
                part = f"the recalibrated copy of {path}"
                self._boundary.attempt(part, write_recalibrated_copy, trainer, module, path, again)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        journal_of(trainer).end(trainer, type(exception).__name__)

    @meeting
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        def act() -> None:
            with on_training_device(trainer, pl_module):
                self._act_on_others(trainer, pl_module)

        if stage == "fit":  # others than those of on_fit_end, which the module's own may put in
            begin_together(self._boundary, self._together(trainer), act)
        self._boundary.attempt("", self._weights.stop_waiting)
        journal_of(trainer).end(trainer)

    def _last_words(self, trainer: Trainer) -> LastWords | None:
        """What was repaired, and which files don't have it: nothing else says so."""
        if self.report is None or not self.kept or self._moment is None:
            return None
        since = self._moment if self.when == "fit_end" else None
        return LastWords(2, [what_was_repaired(trainer, self.report, since, self._saved)])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = time.time()
        if self._final:
            # Averaged weights are saved from the averaging callback's own copy, which the recalibration has not seen.
            checkpoint["state_dict"].update(statistics_in(pl_module))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._count, self._last_step = state_dict["count"], state_dict["last_step"]

    def _at_batch(self, trainer: Trainer, function: Callable[..., object], *arguments: Any) -> None:
        """Ranks meet at the first batch of an evaluation only: they may have different numbers of batches."""
        if not self._at_first:
            self._boundary.attempt("", function, *arguments)
        elif self.when == "validation" or trainer.state.fn != TrainerFn.FITTING:  # or nothing is known of the weights
            begin_together(self._boundary, self._together(trainer), partial(function, *arguments))

    def _act_on_others(self, trainer: Trainer, module: LightningModule) -> None:
        """Act again where the weights are others than those that were acted on."""
        if self._weights.are_others(module, self._together(trainer)):
            self._act(trainer, module)
            self._weights.come_late = True

    def _act(self, trainer: Trainer, module: LightningModule) -> None:
        with self._together(trainer).told():
            self._layers.take_in(module)
        if not self._layers.names:
            why = why_none_learns(self._layers.found)
            rank_zero_warn(f"BatchNormRecalibration: {why}, so their statistics were left as they are.")
            return
        before = self._validate(trainer, module)
        if self._boundary.closed:
            return
        report = self._recalibrate(trainer, module)
        self.report = replace(report, gone=tuple(sorted(self._layers.gone)), not_supported=not_supported(module))
        try:
            after = self._validate(trainer, module)
            self.kept = before is None or after is None or self._scores.better(after, before)
        except BaseException:
            self.report.rollback()
            raise
        if not self.kept:
            self.report.rollback()
        for missing in what_is_missing(self.report):
            rank_zero_warn(missing)
        self._weights.remember(module)
        self._moment = time.time()
        self._final = self.kept and self.when == "fit_end"
        self._count, self._last_step = self._count + 1, trainer.global_step
        outcome = {"metric": self.monitor, "before": before, "after": after, "kept": self.kept}
        self._boundary.attempt("its entries in the loggers", log_report, trainer, self.report, outcome)
        facts = {"step": logging_step(trainer), "when": self.when, **outcome, "report": self.report.as_dict()}
        journal_of(trainer).write(trainer, "recalibration", **facts)

    def _recalibrate(self, trainer: Trainer, module: LightningModule) -> RecalibrationReport:
        ranks, forward = self._together(trainer), partial(self._input.run, trainer)

        def run(batches: Iterator[Any], layers: list[str]) -> RecalibrationReport:
            return recalibrate(
                module,
                self._input.learn_from(trainer, module, batches),
                forward=forward,
                num_batches=self.num_batches,
                tolerance=self.tolerance,
                exact=self.exact,
                layers=layers,
                device=module.device,
                progress=trainer.progress_bar_callback is not None,
                process_group=ranks.group,
            )

        # Each argument by itself, and none in a dict, so that a type checker sees the call.
        measure = partial(
            with_spread, forward=forward, num_batches=self.num_batches, device=module.device, process_group=ranks.group
        )
        with ranks.told():
            report = self._sources.recalibrated(trainer, module, self._layers.learning, run)
            return self._sources.measured(trainer, module, report, measure) if self.spread else report

    def _together(self, trainer: Trainer) -> Ranks:
        if self._ranks is None:
            self._ranks = Ranks(self.process_group or data_parallel_group(trainer), task="BatchNormRecalibration")
        return self._ranks

    def __getstate__(self) -> dict[str, Any]:
        # What the fit has found out about its module is of no use elsewhere, and functions can't be pickled.
        return {**vars(self), "_input": None, "_layers": LearningLayers(), "_ranks": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._input = self._new_input()

    def _new_input(self) -> BatchInput:
        advice = "Say how it goes in: BatchNormRecalibration(forward=lambda module, batch: module(batch[0]))."
        return BatchInput(self.forward, call="BatchNormRecalibration", advice=advice, takes_forward=True)

    def _validate(self, trainer: Trainer, module: LightningModule) -> float | None:
        if self.monitor is None:
            return None
        metrics = validate_once_more(trainer, module)
        if self.monitor not in metrics:
            self._boundary.stop(not_logged("BatchNormRecalibration", self.monitor, metrics))
            return None
        # The same on every rank, or one would roll back where another does not.
        return float(trainer.strategy.reduce(metrics[self.monitor], reduce_op="mean"))
