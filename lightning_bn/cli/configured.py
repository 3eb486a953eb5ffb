"""``lightning-bn recalibrate`` and ``lightning-bn validate``: what builds model and data from a config."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning_bn.checkpoints.atomic_file import write_atomically
from lightning_bn.cli.output import OK, RefusedError, UsageError, print_json, print_table
from lightning_bn.cli.session import Session, load_checkpoint


def recalibrate_checkpoint(options: Namespace) -> int:
    """Write a checkpoint with running statistics that match its weights; all else in it is that of `ckpt_path`."""
    source: Path = options.ckpt_path
    target = options.output or source.with_name(f"{source.stem}-recalibrated{source.suffix}")
    checkpoint = load_checkpoint(source, weights_only=options.weights_only == "true")
    if not target.parent.is_dir():
        raise UsageError(f"there is no directory {target.parent} to write {target.name} into.")
    session = Session(options, checkpoint)
    # After the config, whose mistakes are of more interest than a file that is there.
    if not options.dry_run and target.exists() and not options.overwrite:
        raise RefusedError(f"{target} exists. Pass --output with another name, or --overwrite.")
    report, statistics = session.recalibrate(options, dry_run=options.dry_run)
    if not session.trainer.is_global_zero:
        return OK
    if not options.dry_run:
        checkpoint["state_dict"].update(statistics)
        write_atomically(checkpoint, target)
    if options.json:
        print_json({**report.as_dict(), "output": None if options.dry_run else str(target)})
    else:
        print(report)
        print("Nothing was written." if options.dry_run else f"Written: {target}")
    return OK


def validate_checkpoint(options: Namespace) -> int:
    """Validate a checkpoint under its own statistics and, to `compare`, under recalibrated ones and under the
    batches'."""
    checkpoint = load_checkpoint(options.ckpt_path, weights_only=options.weights_only == "true")
    session = Session(options, checkpoint)
    results = {"checkpoint": session.validate({})}
    if options.compare:
        _, statistics = session.recalibrate(options)
        results["recalibrated"] = session.validate(statistics)
        results["batch statistics"] = session.validate({}, with_batches=True)
    if session.trainer.is_global_zero and options.json:
        print_json({column: {name: _json(value) for name, value in row.items()} for column, row in results.items()})
    elif session.trainer.is_global_zero:
        rows = [(name, *(f"{row[name]:.4g}" for row in results.values())) for name in results["checkpoint"]]
        print_table(("metric", *results), rows)
    return OK


def _json(value: float) -> Any:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
