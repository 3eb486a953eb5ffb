"""Every forward of a model judged, around a loop that serves it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_bn.live_data.judging import Judge
from lightning_bn.live_data.report import DriftReport
from lightning_bn.modes import is_extra_pass
from lightning_bn.outermost import OutermostForward
from lightning_bn.recalibration.image_moments import ImageReader
from lightning_bn.sharding import unwrapped


class DriftWatch:
    """What `watch_drift` has counted; prints as a line.

    Attributes:
        batches: forwards that were judged.
        images: in them.
        alarms: forwards that gave an alarm; of clean data ``alarm * batches`` are expected.
        not_judged: forwards in training mode.
        alarm: the rate of false alarms that was asked for.
        largest_z: of all reports.
        first: the report of the first alarm, None before it.
        last: the report of the last forward, None before the first.
    """

    __module__ = "lightning_bn"

    def __init__(self, alarm: float) -> None:
        self.alarm = alarm
        self.batches = self.images = self.alarms = self.not_judged = 0
        self.largest_z = -math.inf
        self.first: DriftReport | None = None
        self.last: DriftReport | None = None

    def add(self, report: DriftReport) -> bool:
        """Count one more; return whether it is the first alarm."""
        self.last = report
        self.largest_z = max(self.largest_z, report.z)
        self.batches += 1
        self.images += report.images
        self.alarms += report.is_alarm
        if not report.is_alarm or self.first is not None:
            return False
        self.first = report
        return True

    def __str__(self) -> str:
        expected = self.alarm * self.batches
        where = f"; the first at {self.first.first or '(the model)'}" if self.first is not None else ""
        more = f", {self.not_judged} forwards in training mode not judged" if self.not_judged else ""
        return (
            f"{self.alarms} of {self.batches} batches ({self.images} images) gave an alarm, {expected:.3g} are "
            f"expected of clean data{where}{more}."
        )


def warn_of(report: DriftReport, where: str = "") -> None:
    """Warn of an alarm, the first one of a watch."""
    warnings.warn(
        f"{where}{report}\nThis is said once; the counts go on. If the data are meant to be so, measure the spread on "
        "them: recalibrate(model, batches, spread=True, prior=float('inf')).",
        stacklevel=2,
    )


@contextmanager
def watch_drift(model: nn.Module, *, alarm: float = 0.01) -> Iterator[DriftWatch]:
    """Judge every forward of `model` inside the block as `drift` does, and warn of the first alarm.

    What `drift` says of false alarms and of what it can't see holds here. Each forward of n images costs a few small
    operations a layer, and waits for the device once. A call in training mode is not judged, and counted.

    Args:
        model: the module that the loop calls, in eval mode, with a spread.
        alarm: probability of a false alarm in a batch.

    Yields:
        A `DriftWatch` with the counts, and the reports of the first alarm and of the last batch.

    Raises:
        ValueError: as `drift`; at entry, or from the forward whose running statistics have moved.

    Example:
        >>> import torch, warnings
        >>> from lightning_bn import recalibrate, watch_drift
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3)).eval()
        >>> report = recalibrate(model, torch.randn(1000, 3).split(100), spread=True, progress=False)
        >>> with watch_drift(model) as watch, warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     for batch in (torch.randn(8, 3), torch.randn(8, 3) + 4, torch.randn(8, 3) + 4):
        ...         _ = model(batch)
        >>> print(watch)
        2 of 3 batches (24 images) gave an alarm, 0.03 are expected of clean data; the first at 0.
    """
    watch = DriftWatch(alarm)
    judge = Judge(unwrapped(model), alarm, "watch_drift(model)")
    with judge.listening() as images:
        forwards = _JudgedForwards(images, judge, watch)
        forwards.attach(model)
        try:
            yield watch
        finally:
            forwards.detach()


class _JudgedForwards(OutermostForward):
    def __init__(self, images: ImageReader, judge: Judge, watch: DriftWatch) -> None:
        super().__init__()
        self._images = images
        images.listening = False
        self._watch = watch
        self._judge = judge

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        self._images.forget()
        if is_extra_pass():
            return False
        self._watch.not_judged += module.training
        self._images.listening = not module.training
        return not module.training

    def end(self) -> None:
        if not self._images.ran:
            return
        report = self._judge.report(self._images)
        if self._watch.add(report):
            warn_of(report)

    def close(self) -> None:
        self._images.listening = False
        self._images.forget()
