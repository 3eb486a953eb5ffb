"""Many averages in one run, and the validation metrics under each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import fmean
from typing import Any, Literal

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_bn import recalibration
from lightning_bn.averaging import Averaging, check_averaging
from lightning_bn.callbacks.batch_input import BatchInput
from lightning_bn.callbacks.both_lightnings import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    callbacks_of,
    take_turn_after_weight_averaging,
)
from lightning_bn.callbacks.lightning_internals import data_parallel_group, logging_step, why_no_second_pass
from lightning_bn.callbacks.observing import (
    begin_together,
    boundary_of,
    check_logged,
    meet,
    meeting,
    not_logged,
    observing,
)
from lightning_bn.callbacks.recalibrated_sets import LearningLayers
from lightning_bn.callbacks.run_journal import journal_of
from lightning_bn.callbacks.synchronisation import check_plugin_is_applied
from lightning_bn.callbacks.training_pass import quiet, training_pass, validate_once_more
from lightning_bn.comparison.followers import Followers
from lightning_bn.comparison.scores import Scores
from lightning_bn.discovery import find_batch_norms, unserved
from lightning_bn.layers.deferred import settle_together
from lightning_bn.modes import eager
from lightning_bn.ranks.collective import Ranks
from lightning_bn.recalibration.measuring import normalising_with_batches

_OWN = "own"
_RECALIBRATED = "recalibrated"
_BATCH = "batch"
# As many as BatchNormRecalibration takes by default, so that the row shows what that callback would give.
_NUM_BATCHES = 200


@observing
class CompareAverages(Callback):
    """Follow several averages of the batch statistics in one run, and validate under each of them.

    The choice of running statistics does not affect training: only evaluation reads them. So one run can show which
    average would have validated best. Every average sees the batches that the layers see, whatever the layers' class.
    At each validation of the fit the validation set is evaluated under each of them, with ``recalibrated=True`` under
    statistics freshly estimated from up to 200 training batches, and with ``batch=True`` under each validation batch's
    own, all with the weights that Lightning validates. Training, the RNG, the layers' own statistics and the logged
    validation metrics are bit-identical with and without the callback.

    For every validation metric it logs ``batch_norm/compare/<name>/<metric>``; the name ``own`` stands for the layers'
    own statistics. At the end of training it prints a table of `monitor`, with the mean and the worst value over the
    validations, and recommends an average.

    Args:
        averages: the averages to follow, by name. All start from what the layers' buffers hold when the fit begins.
        monitor: the validation metric by which they are compared.
        mode: "min" where a small `monitor` is good, "max" where a large one is.
        recalibrated: also validate under recalibrated statistics; costs up to 200 forward passes a validation.
        batch: also validate with each batch normalised by its own mean and *biased* variance, as in training; what it
            has over ``own`` is the train/eval gap. It is no average, and never recommended.
        dataloader: where the batches of ``recalibrated`` come from; None for the Trainer's training data.
        forward: ``forward(module, batch)``, which runs such a batch through the module; None finds a call that does.

    Attributes:
        scores: a `Scores`: the values of `monitor` for each name, one a validation; prints as the table.
        metrics: every metric of the last validation, by name of the average and of the metric.
        recommended: the name with the best mean over the validations, None before the first.

    Cost: one more pass over each layer's input per training step, and one more validation per row.

    Raises:
        TypeError, ValueError: an invalid argument.
        MisconfigurationException: the fit has no validation, or the model no batch-norm layer that keeps running
            statistics.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import CompareAverages, Exponential, Window
        >>> compare = CompareAverages({"ema 0.1": Exponential(0.1), "window 20": Window(20)}, monitor="val_loss")
        >>> trainer = Trainer(callbacks=[compare], logger=False, enable_checkpointing=False)
    """

    __module__ = "lightning_bn"

    def __init__(
        self,
        averages: Mapping[str, Averaging],
        *,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        recalibrated: bool = True,
        batch: bool = True,
        dataloader: Any = None,
        forward: Callable[[LightningModule, Any], Any] | None = None,
    ) -> None:
        _check_averages(averages)
        self.averages = dict(averages)
        self.monitor = monitor
        self.mode = mode
        self.recalibrated = recalibrated
        self.batch = batch
        self.dataloader = dataloader
        self.forward = forward
        self.scores = Scores(monitor, mode)
        self._boundary = boundary_of("CompareAverages", self._close)
        self._followers: Followers | None = None
        self._saved: dict[str, Any] | None = None
        self._hooks = ExitStack()
        self.metrics: dict[str, dict[str, float]] = {}
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._compares = False  # whether this validation is one of those that are compared
        self._ranks = Ranks(task="CompareAverages")

    @property
    def recommended(self) -> str | None:
        return self.scores.best

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._ranks = Ranks(task="CompareAverages")
        if stage == "fit":
            take_turn_after_weight_averaging(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_plugin_is_applied(trainer, pl_module)
        if not trainer.enable_validation:
            raise MisconfigurationException(
                "CompareAverages: the fit has no validation to compare by. Give trainer.fit a validation loader, and "
                "the module a validation_step."
            )
        advice = "Leave that row out, CompareAverages(..., recalibrated=False), or say how it goes in with forward=."
        self._input = BatchInput(self.forward, call="CompareAverages", advice=advice, takes_forward=True)
        if not any(layer.tracks for layer in find_batch_norms(pl_module)):
            raise MisconfigurationException(
                f"CompareAverages: {type(pl_module).__name__} has no batch-norm layer that keeps running statistics. "
                f"Leave it out.{unserved(pl_module, constant=True)}"
            )
        if others := unserved(pl_module):
            rank_zero_warn(f"CompareAverages compares no averages of some layers.{others}")
        settle_together(pl_module)
        self._followers = Followers(pl_module, self.averages, boundary=self._boundary)
        if self._saved is None:
            self.scores.values = {}  # of an earlier fit
        else:
            self._followers.load_state_dict(self._saved)
            self._saved = None
        self._hooks.enter_context(self._followers.following())

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_logged("CompareAverages", self.monitor, trainer.callback_metrics)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        journal_of(trainer).begin(trainer, pl_module)
        if self.recalibrated and self.dataloader is None and (reason := why_no_second_pass(trainer)):
            raise MisconfigurationException(
                f"CompareAverages: the training loader {reason}. Give the recalibrated row a loader of its own, "
                "CompareAverages(..., dataloader=...), or leave it out: recalibrated=False."
            )
        self._layers = LearningLayers()
        self._layers.look(pl_module)
        self._looked = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.recalibrated and self.dataloader is None and not self._input.known and batch is not None:
            with quiet(trainer, pl_module):
                self._input.learn_from(trainer, pl_module, iter([batch]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._layers.note_modes()
        if not self._looked:
            self._check_sight()
            self._looked = True

    @meeting
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here, and not at the end: weight averaging has its weights in, and what Lightning is about to validate is what
        # is compared.
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._compares = True
        self._boundary.attempt("", self._check_sight)
        # A rank on which the callback has failed would leave the others waiting in a forward.
        begin_together(self._boundary, self._ranks, partial(self._validate, trainer, pl_module))

    def _validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate under each average."""
        for name in self.averages:
            with self._following().applied(name):
                self._pending[name] = validate_once_more(trainer, pl_module)
        chosen = self._layers.names
        if self.recalibrated and chosen:
            with self._recalibrated(trainer, pl_module):
                self._pending[_RECALIBRATED] = validate_once_more(trainer, pl_module)
        if self.batch and chosen:
            layers = [layer.module for layer in find_batch_norms(pl_module) if layer.name in chosen]
            with eager(pl_module), normalising_with_batches(layers):
                self._pending[_BATCH] = validate_once_more(trainer, pl_module)

    @meeting
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._compares:
            self._compares = False
            meet(self._boundary, self._ranks, self._score, trainer)

    def _score(self, trainer: Trainer) -> None:
        """Compare what the validations have given, and log it."""
        with self._ranks.told():
            names = list(dict.fromkeys(key for metrics in self._pending.values() for key in metrics))
            own = {key: trainer.callback_metrics[key] for key in names if key in trainer.callback_metrics}
            rows = {
                name: {key: float(value) for key, value in metrics.items()}
                for name, metrics in {_OWN: own, **self._pending}.items()
            }
        self._pending = {}
        if any(self.monitor not in metrics for metrics in rows.values()):
            self._boundary.stop(not_logged("CompareAverages", self.monitor, names))
            return
        # The mean over ranks: the same on each, as what it recommends must be.
        ranks = self._ranks.share(rows)
        self.metrics = {
            name: {key: fmean(each[name][key] for each in ranks) for key in metrics} for name, metrics in rows.items()
        }
        self.scores.add({name: metrics[self.monitor] for name, metrics in self.metrics.items() if name != _BATCH})
        tags = {
            f"batch_norm/compare/{name}/{key}": value
            for name, metrics in self.metrics.items()
            for key, value in metrics.items()
        }
        for logger in trainer.loggers:
            part = f"its entries in {type(logger).__name__}"
            self._boundary.attempt(part, logger.log_metrics, tags, step=logging_step(trainer))
        journal_of(trainer).write(
            trainer,
            "averages",
            step=logging_step(trainer),
            monitor=self.monitor,
            mode=self.scores.mode,
            metrics=self.metrics,
            recommended=self.recommended,
            advice=self._advice(trainer),
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.recommended is not None:
            print(f"\n{self.scores}\nRecommended: {self._advice(trainer)}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()
        journal_of(trainer).end(trainer, type(exception).__name__)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()
        journal_of(trainer).end(trainer)

    def state_dict(self) -> dict[str, Any]:
        followers = self._saved if self._followers is None else self._followers.state_dict()
        return {"followers": followers, "values": self.scores.values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["followers"]
        self.scores.values = state_dict["values"]

    def _close(self) -> None:
        self._pending = {}
        self._hooks.close()

    def _following(self) -> Followers:
        if self._followers is None:
            raise MisconfigurationException("CompareAverages follows no fit yet: give it to a Trainer, and call fit().")
        return self._followers

    def _check_sight(self) -> None:
        missed = self._following().missed()
        if missed:
            self._boundary.stop(
                f"it did not see {', '.join(missed)} run in training: they were compiled in this process before the "
                "fit, and hooks that come later are never called. Call torch.compiler.reset() before the fit, or leave "
                "the callback out."
            )

    @contextmanager
    def _recalibrated(self, trainer: Trainer, module: LightningModule) -> Iterator[None]:
        chosen = self._layers.names
        with ExitStack() as stack:
            with training_pass(trainer, module, self.dataloader) as batches:
                stack.enter_context(
                    recalibration.recalibrated(
                        module,
                        self._input.learn_from(trainer, module, batches),
                        forward=partial(self._input.run, trainer),
                        num_batches=_NUM_BATCHES,
                        layers=sorted(chosen),
                        device=module.device,
                        process_group=data_parallel_group(trainer),
                        progress=False,
                    )
                )
            yield

    def _advice(self, trainer: Trainer) -> str:
        repair = "BatchNormRecalibration(when='validation')"
        if self.recommended == _RECALIBRATED:
            return repair
        averaging = self.averages.get(self.recommended or _OWN)
        if averaging is not None:
            return f"convert_batch_norm(model, {averaging!r})"
        # By name, since callbacks don't know each other.
        for callback in callbacks_of(trainer):
            if type(callback).__name__ == "BatchNormRecalibration" and getattr(callback, "when", "") == "validation":
                return f"the layers' own statistics, as {repair} repairs them before each validation: {_OWN!r} has that"
        return "the layers' own averages, as they are"


def _check_averages(averages: Mapping[str, Averaging]) -> None:
    if not isinstance(averages, Mapping) or not averages:
        raise TypeError(
            f"CompareAverages({averages!r}): averages by name, as in CompareAverages({{'window 20': Window(20)}})."
        )
    for name, averaging in averages.items():
        check_averaging(averaging, f"CompareAverages({{{name!r}: {averaging!r}}})")
        if name in (_OWN, _RECALIBRATED, _BATCH):
            raise ValueError(
                f"CompareAverages({{{name!r}: ...}}): {name!r} is the name of a row that the callback adds; choose "
                f"another."
            )
