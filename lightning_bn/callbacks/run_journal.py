"""The journal of a run, which the callbacks of one Trainer share; here Trainers become plain numbers and strings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray

from lightning_bn.activations.description import unjudged, warming
from lightning_bn.activations.registry import COLUMNS
from lightning_bn.activations.sample import ABSENT, Sample
from lightning_bn.activations.watched_layers import select_layers
from lightning_bn.callbacks.both_lightnings import LightningModule, Trainer
from lightning_bn.callbacks.lightning_internals import logging_step
from lightning_bn.callbacks.loggers import main_directory
from lightning_bn.discovery import BatchNormLayer, find_batch_norms
from lightning_bn.error_boundary import ErrorBoundary, guarded
from lightning_bn.journal.writer import Journal
from lightning_bn.layers.settlement import rule_of
from lightning_bn.rules.page import rule_page

_JOURNALS: WeakKeyDictionary[Any, RunJournal] = WeakKeyDictionary()


class Moment(NamedTuple):
    """When a sample was taken."""

    step: int
    epoch: int
    rates: dict[str, float]  # learning rates by name, in training

    @classmethod
    def of(cls, trainer: Trainer, stage: str, step: int) -> Moment:
        return cls(step, trainer.current_epoch, rates_of(trainer) if stage == "train" else {})


class RunJournal:
    """What a Trainer does, line by line. Every callback tells the hooks it has; what two of them tell is written once.

    What goes wrong inside of it ends the journal, and no callback.

    Args:
        journal: where the lines go.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.has_mistake = False
        """Whether `ModeCheck` has found a mistake that nothing has mended: no run is called healthy beside one."""
        self.before_end: list[Callable[[], object]] = []
        """Write what callbacks of this fit have yet to write; another callback may be the first to tell the end."""
        self._boundary = ErrorBoundary(f"The journal {journal.path}", self._close)
        self._begun = False
        self._norms: list[BatchNormLayer] = []
        self._waiting: list[tuple[str, dict[str, Any]]] = []
        self._episodes: dict[tuple[Any, ...], tuple[str, ...]] = {}
        self._rules: set[str] = set()

    @guarded
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin a fit, when the step at which it begins is known; what came before waited for this."""
        if self._begun:
            return
        self._begun = True
        self._episodes, self._rules = {}, set()
        self._norms = find_batch_norms(module)
        self.journal.forget()
        step, epoch = logging_step(trainer), trainer.current_epoch
        resumed = step > 0 or trainer.ckpt_path is not None
        self.journal.write("start", time=round(time.time(), 3), step=step, epoch=epoch, resumed=resumed)
        self.journal.write("layers", layers=_describe_layers(module))
        waiting, self._waiting = self._waiting, []
        for kind, fields in waiting:
            self.journal.write(kind, **fields)

    @guarded
    def epoch(self, trainer: Trainer) -> None:
        """Tell that an epoch of training begins; layers that came or went are known from here on."""
        self._norms = find_batch_norms(trainer.lightning_module)
        self.journal.write_once("epoch", step=logging_step(trainer), epoch=trainer.current_epoch)

    @guarded
    def validation(self, trainer: Trainer) -> None:
        """Tell that a validation within a fit has ended."""
        if self._begun and not trainer.sanity_checking:
            self.journal.write_once("validation", step=logging_step(trainer), epoch=trainer.current_epoch)

    @guarded
    def modes(self, trainer: Trainer) -> None:
        """Tell which batch-norm layers are in eval mode in a training step, where that has changed."""
        if self.journal.path is not None:
            asleep = [layer.name for layer in self._norms if not layer.module.training]
            self.journal.write_once("modes", by="eval", step=logging_step(trainer), eval=asleep)

    @guarded
    def write(self, trainer: Trainer, kind: str, **fields: Any) -> None:
        """Write a line; within a fit that has not begun yet, when it does."""
        if self._begun or trainer.state.fn != TrainerFn.FITTING:
            self.journal.write(kind, **fields)
        elif self.journal.path is not None:
            self._waiting.append((kind, fields))

    @guarded
    def sample(self, stage: str, moment: Moment, sample: Sample) -> None:
        """Write what was measured of all layers."""
        self.journal.write_sample(
            stage,
            moment.step,
            moment.epoch,
            rows=sample.layers,
            columns=COLUMNS,
            values=sample.values,
            has_value=sample.states != ABSENT,
            rates=moment.rates,
            warming=warming(sample),
            unjudged=unjudged(sample),
        )

    @guarded
    def channels(self, stage: str, step: int, samples: int, sample: Sample) -> None:
        """Write means, deviations and drift of all channels, and the histograms, at the samples that are kept."""
        vectors = sample.channels if self.journal.wants_channels(stage, samples) else {}
        if not vectors:
            return
        drift = sample.channel_drift
        layers = {
            layer: {
                "mean": mean.tolist(),
                "std": std.tolist(),
                "dead": np.flatnonzero((mean == 0) & (std == 0)).tolist(),
                **_named(drift.get(layer)),
            }
            for layer, (mean, std) in vectors.items()
        }
        self.journal.write_channels(stage, step, samples, layers)
        if sample.histograms:
            counts = {layer: each.tolist() for layer, each in sample.histograms.items()}
            self.journal.write("histograms", stage=stage, step=step, layers=counts)

    @guarded
    def rule(self, trainer: Trainer, code: str) -> None:
        """Write the page of a rule that something refers to, once a fit: whoever reads the journal has it at hand."""
        if code and code not in self._rules:
            self._rules.add(code)
            self.write(trainer, "rule", step=logging_step(trainer), code=code, text=rule_page(code))

    @guarded
    def unseen(self, trainer: Trainer, stage: str, layers: Mapping[str, str]) -> None:
        """Write which layers can't be looked at, and why."""
        if layers:
            self.write(trainer, "unseen", step=logging_step(trainer), stage=stage, layers=dict(layers))

    @guarded
    def episodes(self, trainer: Trainer, described: Iterable[dict[str, Any]]) -> None:
        """Write the episodes that are new or have changed in more than how long they last."""
        for each in described:
            key = (each["stage"], each["layer"], each["statistic"], each["first"])
            told = tuple(map(str, (each["recovered"], each["peak"], each["cause"])))
            if self._episodes.get(key) != told:
                self._episodes[key] = told
                self.rule(trainer, each["rule"])
                self.journal.write("episode", **each)

    def failure(self, trainer: Trainer, observer: str, part: str, traceback: str) -> str | None:
        """Write what went wrong inside of a callback; return where, None where nothing can be written."""
        self.write(trainer, "failure", step=logging_step(trainer), observer=observer, part=part, traceback=traceback)
        return None if self.journal.path is None else f"in {self.journal.path}"

    def _close(self) -> None:
        self.journal = Journal(None)

    @guarded
    def end(self, trainer: Trainer, status: str = "finished") -> None:
        """Tell how a fit ended."""
        late, self.before_end = self.before_end, []
        for catch_up in late:
            catch_up()
        if self._begun or self._waiting:
            waiting, self._waiting = self._waiting, []
            for kind, fields in waiting:
                self.journal.write(kind, **fields)
            self.journal.write("end", time=round(time.time(), 3), step=logging_step(trainer), status=status)
            self._begun = False


def journal_of(trainer: Trainer) -> RunJournal:
    """Return the journal of a Trainer, which writes on rank 0 alone, and nothing where the Trainer is to leave no
    trace."""
    if trainer not in _JOURNALS:
        writes = trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False)
        _JOURNALS[trainer] = RunJournal(Journal(main_directory(trainer) if writes else None))
    return _JOURNALS[trainer]


def rates_of(trainer: Trainer) -> dict[str, float]:
    """Return the learning rates by optimizer and group; one that lies on a device is left there."""
    found = {}
    for place, optimizer in enumerate(trainer.optimizers):
        name = type(optimizer).__name__ + (f" {place}" if len(trainer.optimizers) > 1 else "")
        groups = optimizer.param_groups
        for number, group in enumerate(groups[:8]):
            rate = group.get("lr")
            if isinstance(rate, (int, float)):
                found[f"{name}/{number}" if len(groups) > 1 else name] = float(f"{rate:.6g}")
    return found


def _named(drift: tuple[NDArray[np.float64], NDArray[np.float64]] | None) -> dict[str, list[float]]:
    if drift is None or np.isnan(drift[0]).all():
        return {}
    return {"drift_mean": drift[0].tolist(), "drift_var": drift[1].tolist()}


def _describe_layers(module: LightningModule) -> list[dict[str, Any]]:
    norms = {name: layer for layer in find_batch_norms(module) for name in layer.names}
    chosen = select_layers(module)
    return [{"name": name, "class": type(each).__name__, **_norm(norms.get(name))} for name, each in chosen.items()]


def _norm(layer: BatchNormLayer | None) -> dict[str, Any]:
    if layer is None:
        return {}
    return {
        "channels": layer.module.num_features,
        "averaging": str(rule_of(layer.module)) if layer.tracks else None,
        "momentum": layer.module.momentum,
        "affine": layer.module.affine,
        "frozen": layer.frozen,
    }
