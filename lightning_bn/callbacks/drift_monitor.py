"""Live data judged in validation, test and prediction."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

from lightning_bn.callbacks.both_lightnings import Callback, LightningModule, Trainer, evaluation_stage
from lightning_bn.callbacks.lightning_internals import data_parallel_group, logging_step
from lightning_bn.callbacks.observing import boundary_of, meet, meeting, observing
from lightning_bn.discovery import find_batch_norms
from lightning_bn.live_data.judging import Judge
from lightning_bn.live_data.watching import DriftWatch, warn_of
from lightning_bn.ranks.collective import Ranks
from lightning_bn.recalibration.image_moments import ImageReader
from lightning_bn.recalibration.measuring import normalises_its_input
from lightning_bn.recalibration.spread import keep_spread
from lightning_bn.torchscript import scriptable


@observing
class DriftMonitor(Callback):
    """Judge each batch of validation, test and prediction as `lightning_bn.drift` does, and warn of the first alarm.

    It needs a spread of data like those that come: of ``BatchNormRecalibration(spread=True, dataloader=...)`` in the
    fit, of ``recalibrate(..., spread=True)``, or of the checkpoint that is loaded, for which it makes room. Without it,
    or while the statistics lag behind the training, it says once that it does not judge. It changes no result.

    A batch is judged as a whole, over all that the module does with it: a step that runs the network more often than
    the pass by which the spread was measured can't be judged. Each rank judges its own batches, and warns of its own
    first alarm.

    At the end of each stage the loggers get ``batch_norm/drift/<stage>/alarm_rate``, of which `alarm` is to be
    expected, and ``.../z``, the largest, both over the batches of all ranks.

    Args:
        alarm: probability of a false alarm in a batch.

    Attributes:
        watches: by stage ("validate", "test", "predict") a `DriftWatch` of this rank, with the counts since ``setup``,
            the report of the first alarm and that of the last batch.

    Raises:
        ValueError: `alarm` is no probability.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import DriftMonitor
        >>> trainer = Trainer(callbacks=[DriftMonitor(alarm=0.01)], logger=False, enable_checkpointing=False)
    """

    __module__ = "lightning_bn"

    def __init__(self, *, alarm: float = 0.01) -> None:
        if not 0 < alarm < 1:
            raise ValueError(f"DriftMonitor(alarm={alarm!r}): the probability of a false alarm, as in 0.01.")
        self.alarm = alarm
        self.watches: dict[str, DriftWatch] = {}
        self._boundary = boundary_of("DriftMonitor", self._close)
        self._hooks = ExitStack()
        self._images: ImageReader | None = None
        self._judge: Judge | None = None
        self._told: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.watches, self._told = {}, set()
        keep_spread(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._begin(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module)

    on_predict_start = on_test_start

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        if self._images is not None:
            self._images.forget()
            self._images.listening = True

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        self._look(evaluation_stage(trainer), trainer, pl_module)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    @meeting
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ranks = Ranks(data_parallel_group(trainer), task="DriftMonitor")
        meet(self._boundary, ranks, self._end, evaluation_stage(trainer), trainer, ranks)

    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def _begin(self, module: LightningModule) -> None:
        """Set the hooks. Whether there is a spread is known with the first batch: it may be measured until then."""
        self._close()
        layers = [each.module for each in find_batch_norms(module) if each.tracks and normalises_its_input(each.module)]
        self._hooks.callback(scriptable(module))
        self._images = self._hooks.enter_context(ImageReader(layers, self._boundary.guard))
        self._images.listening = False

    def _look(self, stage: str, trainer: Trainer, module: LightningModule) -> None:
        images = self._images
        if images is None:
            return
        images.listening = False
        try:
            self._judge = self._judge or Judge(module, self.alarm, "DriftMonitor()")
            report = self._judge.report(images)
        except ValueError as error:  # what a user of drift(...) is told at once
            self._close()
            self._tell_once(f"{stage} is not judged. {error}")
            return
        watch = self.watches.setdefault(stage, DriftWatch(self.alarm))
        if watch.add(report):
            where = f", rank {trainer.global_rank}" if trainer.world_size > 1 else ""
            warn_of(report, f"DriftMonitor, {stage}{where}: ")

    def _end(self, stage: str, trainer: Trainer, ranks: Ranks) -> None:
        watch = None if self._images is None else self.watches.get(stage)
        self._close()
        own = None if watch is None else (watch.alarms, watch.batches, watch.largest_z)
        judged = [each for each in ranks.share(own) if each is not None]
        if judged:
            alarms, batches, z = zip(*judged, strict=True)
            values = {"alarm_rate": sum(alarms) / sum(batches), "z": max(z)}
            scalars = {f"batch_norm/drift/{stage}/{name}": value for name, value in values.items()}
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=logging_step(trainer))

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            warnings.warn(text, stacklevel=2)

    def _close(self) -> None:
        self._hooks.close()
        self._images = self._judge = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_hooks": ExitStack(), "_images": None, "_judge": None}
