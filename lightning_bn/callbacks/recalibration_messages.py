"""What `BatchNormRecalibration` says: of its arguments, of models without a layer to recalibrate, and to loggers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_bn.callbacks.batch_input import calls_of_parts
from lightning_bn.callbacks.both_lightnings import (
    CombinedLoader,
    LightningModule,
    MisconfigurationException,
    Trainer,
    is_overridden,
)
from lightning_bn.callbacks.checkpoint_files import KINDS, files_from_before
from lightning_bn.callbacks.lightning_internals import logging_step
from lightning_bn.callbacks.loggers import log_markdown
from lightning_bn.discovery import BatchNormLayer, find_batch_norms, learning, listing, unserved
from lightning_bn.recalibration.report import RecalibrationReport
from lightning_bn.tables import markdown_table

_NOTHING = 0.01
"""In standard deviations, and as the log of a ratio of variances: what nobody sees in an answer."""


def why_none_learns(layers: list[BatchNormLayer]) -> str:
    """Say why no layer was learning: not every one that is in eval mode was meant to be."""
    names = [layer.name or "(the module)" for layer in learning(layers, ())]
    if not names:
        return "every batch-norm layer is frozen"
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{listed} can learn, but no batch-norm layer was in training mode in the last training step (if that was not "
        "meant, call module.train() before the fit)"
    )


def check_fit(trainer: Trainer, module: LightningModule, *, forward: Any, monitor: str | None) -> None:
    """Raise at the start of a fit where there is nothing to recalibrate, or no way to do it.

    Raises:
        MisconfigurationException: with what to change.
    """
    # One that is frozen may not track for now (`BaseFinetuning` tells its layers so), and will when it is unfrozen.
    if not any(layer.module.running_mean is not None for layer in find_batch_norms(module)):
        raise MisconfigurationException(
            f"BatchNormRecalibration: {type(module).__name__} has no batch-norm layer that keeps running statistics. "
            f"Leave the callback out of Trainer(callbacks=...).{unserved(module, constant=True)}"
        )
    if forward is None and not module.automatic_optimization and not is_overridden("forward", module):
        raise MisconfigurationException(
            f"BatchNormRecalibration: {type(module).__name__} uses manual optimization, so its training_step can't be "
            "run, and it has no forward. Say how a batch goes in, with what training_step gives each part in place of "
            f"...: BatchNormRecalibration({calls_of_parts(module) or 'forward=lambda module, batch: ...'})."
        )
    if monitor is not None and not trainer.enable_validation:
        raise MisconfigurationException(
            f"BatchNormRecalibration(monitor={monitor!r}): the fit has no validation to compare by. Leave out "
            "monitor=, or give trainer.fit a validation loader and the module a validation_step."
        )


def what_is_missing(report: RecalibrationReport) -> list[str]:
    """Return what a user is to be warned of after a recalibration."""
    missing = []
    if report.not_run:
        missing.append(
            f"BatchNormRecalibration: {', '.join(report.not_run)} did not run and kept their statistics. If training "
            "runs them, say how a batch goes in: BatchNormRecalibration(forward=lambda module, batch: ...)."
        )
    if report.not_supported:
        missing.append(f"BatchNormRecalibration can't recalibrate {'; '.join(report.not_supported)}.")
    if report.no_spread:
        missing.append(f"BatchNormRecalibration(spread=True): no spread is kept of {'; '.join(report.no_spread)}.")
    return missing


def what_was_repaired(trainer: Trainer, report: RecalibrationReport, since: float | None, saved: float | None) -> str:
    """Return one sentence for the end of a fit.

    Args:
        trainer: whose checkpoint callbacks may have saved before.
        report: the last one.
        since: when it was made, in seconds since the epoch; None where each checkpoint is saved behind one.
        saved: when the last checkpoint was made, whoever keeps it.
    """
    before = [] if since is None else files_from_before(trainer, since)
    ran = [layer for layer in report.layers if layer.batches]
    worst = max(ran, key=lambda layer: layer.shift, default=None)
    moved = ""
    if worst is not None and worst.shift < _NOTHING:
        moved = "; they fitted already"
    elif worst is not None:
        moved = (
            f"; {worst.name or 'the layer'} was furthest off, its mean by {worst.mean_shift_rms:.2g} standard "
            f"deviations and its variance by a factor of {math.exp(worst.log_variance_ratio_rms):.3g} (rms over "
            "channels)"
        )
    norms = f"{len(ran)} batch norm{'s' * (len(ran) != 1)}"
    text = f"BatchNormRecalibration: the statistics of {norms} were recalibrated{moved}."
    # Somebody else, Ray Train or a callback of one's own.
    others = not trainer.checkpoint_callbacks and since is not None and saved is not None and saved <= since
    if not before and others:
        return (
            f"{text} The last checkpoint was saved before that, with the old statistics: with "
            "BatchNormRecalibration(when='validation') each is saved behind a recalibration."
        )
    if not before:
        return text
    files = listing([str(path) for path in before], 4)
    return (
        f"{text} Saved before that, with the old statistics: {files}. A copy of each with its own: lightning-bn "
        f"recalibrate --config CONFIG --ckpt_path {before[0]}; in the next fit, "
        "BatchNormRecalibration(checkpoints=('best', 'last'))."
    )


def check_arguments(
    when: str,
    every_n_epochs: int,
    num_batches: int | None,
    tolerance: float | None,
    exact: bool,
    dataloader: Any,
    checkpoints: Sequence[str],
) -> None:
    """Raise a ValueError or TypeError that shows the argument of `BatchNormRecalibration` that is wrong."""
    if when not in ("fit_end", "validation"):
        raise ValueError(f"BatchNormRecalibration(when={when!r}): when is 'fit_end' or 'validation'.")
    if not isinstance(every_n_epochs, int) or every_n_epochs < 1:
        raise ValueError(f"BatchNormRecalibration(every_n_epochs={every_n_epochs!r}): a number of epochs, at least 1.")
    if num_batches is not None and (not isinstance(num_batches, int) or num_batches < 1):
        raise ValueError(
            f"BatchNormRecalibration(num_batches={num_batches!r}): a number of batches, at least 1, or None for all."
        )
    if tolerance is not None and (exact or not tolerance > 0):
        raise ValueError(
            f"BatchNormRecalibration(tolerance={tolerance!r}, exact={exact!r}): tolerance is a standard error in "
            "standard deviations, above 0, and goes with exact=False, since exact needs all batches at once."
        )
    if isinstance(dataloader, Iterator) and not isinstance(dataloader, CombinedLoader):
        raise TypeError(
            f"BatchNormRecalibration(dataloader={dataloader!r}): an iterator is used up after one pass. Pass what can "
            "be iterated again, a DataLoader or a list of batches."
        )
    if isinstance(checkpoints, str) or not set(checkpoints) <= set(KINDS):
        raise ValueError(
            f"BatchNormRecalibration(checkpoints={checkpoints!r}): any of 'best' and 'last', as in "
            f"checkpoints=('best', 'last')."
        )


_PREFIX = "batch_norm/recalibration"


def log_report(trainer: Trainer, report: RecalibrationReport, outcome: Mapping[str, Any]) -> None:
    """Log the worst layers' figures as scalars to every logger, and the whole report as text to TensorBoard.

    A handful of tags however many layers there are: thousands make TensorBoard unusable.

    Args:
        trainer: whose loggers these are.
        report: of the recalibration.
        outcome: `metric`, by which it was judged, its value `before` and `after`, and whether it was `kept`; a metric
            of None: it was not judged, and nothing of this is logged.
    """
    metric, loggers, step = outcome["metric"], trainer.loggers, logging_step(trainer)
    judged = {f"{metric}_{name}": outcome[name] for name in ("before", "after")} | {"kept": float(outcome["kept"])}
    scalars = {
        "batches": float(report.batches),
        "mean_shift": max(layer.mean_shift_rms for layer in report.layers),
        "log_variance_ratio": max(layer.log_variance_ratio_rms for layer in report.layers),
        "standard_error": max(layer.standard_error for layer in report.layers),
        **({name: value for name, value in judged.items() if value is not None} if metric else {}),
    }
    for logger in loggers:
        logger.log_metrics({f"{_PREFIX}/{name}": value for name, value in scalars.items()}, step=step)
    log_markdown(loggers, f"{_PREFIX}/report", markdown(report), step)


def markdown(report: RecalibrationReport) -> str:
    """Return the report as a Markdown table under its headline, the worst layers first."""
    headline, *_ = str(report).splitlines()
    rows = sorted(
        report.as_dict()["layers"], key=lambda row: -max(row["mean_shift_rms"] or 0, row["log_variance_ratio_rms"] or 0)
    )
    cells = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    header = [name.replace("_", " ") for name in rows[0]]
    return "\n".join([headline, "", *markdown_table(header, cells, left=2)])
