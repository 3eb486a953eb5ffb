"""A recalibration's report, for the Trainer's loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_bn.callbacks.both_lightnings import Trainer
from lightning_bn.callbacks.lightning_internals import logging_step
from lightning_bn.callbacks.loggers import log_markdown
from lightning_bn.recalibration.report import RecalibrationReport
from lightning_bn.tables import markdown_table

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
    cells = [[_cell(value) for value in row.values()] for row in rows]
    header = [name.replace("_", " ") for name in rows[0]]
    return "\n".join([headline, "", *markdown_table(header, cells, left=2)])


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
