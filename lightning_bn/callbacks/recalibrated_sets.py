"""What `BatchNormRecalibration` recalibrates, and with which batches: the layers that learn; one source, or one for
each set of statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch.nn import Module

from lightning_bn.callbacks.both_lightnings import CombinedLoader, LightningModule, MisconfigurationException, Trainer
from lightning_bn.callbacks.training_pass import training_pass
from lightning_bn.discovery import BatchNormLayer, find_batch_norms, in_eval_mode, learning
from lightning_bn.recalibration.report import RecalibrationReport
from lightning_bn.set_in_use import has_sets
from lightning_bn.sets.statistics_sets import StatisticsSets


class Sources:
    """The loaders of a recalibration, None for the Trainer's training data.

    Args:
        dataloader: for the statistics in place, where there are no `sets`.
        sets: by the name of a set.
        spread: whether the spread of images is to be measured too.
        call: the user's, as an error is to show it.

    Raises:
        TypeError: no mapping of names; an iterator, which is used up after one pass.
        ValueError: both are given, or a spread is to be measured of several sets.
    """

    def __init__(
        self,
        dataloader: Any,
        sets: Mapping[str, Any] | None,
        *,
        spread: bool = False,
        call: str = "BatchNormRecalibration(sets=...)",
    ) -> None:
        if sets is not None:
            _check(sets, dataloader)
            if spread:
                raise ValueError(
                    "BatchNormRecalibration(sets=..., spread=True): a layer keeps one spread, of the statistics in "
                    "place. Measure it with the set that is to be served: with sets.use(name): recalibrate(model, "
                    "batches, spread=True)."
                )
        self._loaders: dict[str | None, Any] = {None: dataloader} if sets is None else dict(sets.items())
        self._names = list(sets or ())
        self._call = call

    @property
    def names(self) -> list[str | None]:
        """The sets; None stands for what is in place."""
        return list(self._loaders)

    @property
    def are_given(self) -> bool:
        """Whether none of them is the Trainer's training data."""
        return all(loader is not None for loader in self._loaders.values())

    def check(self, module: LightningModule) -> None:
        """Raise at the start of a fit where `module` has no such sets.

        Raises:
            MisconfigurationException: with what to change.
        """
        if self._names:
            self._sets(module)

    @contextmanager
    def batches(self, trainer: Trainer, module: LightningModule, name: str | None) -> Iterator[Iterator[Any]]:
        """Yield an iterator over the batches of a set, which is in place meanwhile; see `training_pass`."""
        with ExitStack() as stack:
            if name is not None:
                stack.enter_context(self._sets(module).use(name))
            yield stack.enter_context(training_pass(trainer, module, self._loaders[name]))

    def recalibrated(
        self,
        trainer: Trainer,
        module: LightningModule,
        layers: list[BatchNormLayer],
        recalibrate: Callable[[Iterator[Any], list[str]], RecalibrationReport],
    ) -> RecalibrationReport:
        """Recalibrate every set, or none.

        Args:
            trainer: in a fit.
            module: its LightningModule.
            layers: those to recalibrate. One without sets belongs to the first set.
            recalibrate: called with batches and the names of the layers.
        """
        reports: dict[str | None, RecalibrationReport] = {}
        first = {None, *([self._sets(module).names[0]] if self._names else ())}
        try:
            for name in self.names:
                chosen = sorted(layer.name for layer in layers if name in first or has_sets(layer.module))
                with self.batches(trainer, module, name) as batches:
                    reports[name] = recalibrate(batches, chosen)
        except BaseException:
            for report in reports.values():
                report.rollback()
            raise
        return _together(reports)

    def measured(
        self,
        trainer: Trainer,
        module: LightningModule,
        report: RecalibrationReport,
        measure: Callable[[RecalibrationReport, LightningModule, Iterator[Any]], RecalibrationReport],
    ) -> RecalibrationReport:
        """Let `measure` go over the batches once more, and return its report; roll `report` back if it fails."""
        try:
            with self.batches(trainer, module, None) as batches:
                return measure(report, module, batches)
        except BaseException:
            report.rollback()
            raise

    def _sets(self, module: LightningModule) -> StatisticsSets:
        found = [part for part in module.modules() if isinstance(part, StatisticsSets)]
        for sets in found:
            if set(self._names) <= set(sets.names):
                return sets
        there = "; ".join(str(list(sets.names)) for sets in found) or "none"
        raise MisconfigurationException(
            f"{self._call}: {type(module).__name__} has no StatisticsSets with all of {self._names}; it has {there}. "
            f"Make them in its __init__: self.sets = StatisticsSets(self.net, {self._names})."
        )


def _check(sets: Mapping[str, Any], dataloader: Any) -> None:
    call = "BatchNormRecalibration(sets=...)"
    if not isinstance(sets, Mapping) or not sets or not all(isinstance(name, str) for name in sets):
        raise TypeError(
            f"{call}: sets={sets!r} is no loader by the name of each set, as in sets={{'day': None, 'night': "
            "night_loader}; None is the Trainer's training data."
        )
    if dataloader is not None:
        raise ValueError(f"{call}: dataloader is for a module without sets. Give each set its loader, in sets.")
    for name, loader in sets.items():
        if isinstance(loader, Iterator) and not isinstance(loader, CombinedLoader):
            raise TypeError(
                f"{call}: the loader of {name!r} is an iterator, which is used up after one pass. Pass what can be "
                "iterated again, a DataLoader or a list of batches."
            )


def _together(reports: Mapping[str | None, RecalibrationReport]) -> RecalibrationReport:
    """Return one report of several, in which a layer of a set is named as the monitor names it: ``bn1@adversarial``."""
    if None in reports:
        return reports[None]
    first, *_ = every = list(reports.values())
    return replace(
        first,
        batches=sum(report.batches for report in every),
        samples=sum(report.samples for report in every),
        skipped=sum(report.skipped for report in every),
        spilled=max(report.spilled for report in every),
        layers=tuple(
            replace(layer, name=f"{layer.name}@{name}") for name, report in reports.items() for layer in report.layers
        ),
        not_run=tuple(f"{layer}@{name}" for name, report in reports.items() for layer in report.not_run),
        _changes=tuple(change for report in every for change in report._changes),
    )


class LearningLayers:
    """The batch norms of a module that learn: not frozen, and in training mode when a batch was last trained.

    Attributes:
        found: all batch norms that keep running statistics.
        gone: the names of those that were learning and are there no more.
    """

    def __init__(self) -> None:
        self.found: list[BatchNormLayer] = []
        self.gone: set[str] = set()
        self._in_eval: set[Module] = set()

    def look(self, module: Module) -> None:
        """Find the layers as they are now; how they train is read off when a batch has been trained."""
        self.take_in(module)
        self.note_modes()

    def take_in(self, module: Module) -> None:
        """Let layers that came since the layers were last looked at count too, unless they are frozen."""
        now = find_batch_norms(module)
        self.gone |= self.names - {layer.name for layer in now}
        self.found = now

    def note_modes(self) -> None:
        """Note who is in training mode: to be called after a training step."""
        self._in_eval = in_eval_mode(self.found)

    @property
    def learning(self) -> list[BatchNormLayer]:
        """Those that learn."""
        return learning(self.found, self._in_eval)

    @property
    def names(self) -> set[str]:
        """Their names."""
        return {layer.name for layer in self.learning}
