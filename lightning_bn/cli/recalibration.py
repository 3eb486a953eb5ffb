"""``lightning-bn recalibrate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_bn.checkpoints.atomic_file import write_atomically
from lightning_bn.cli.output import OK, RefusedError, UsageError, print_json
from lightning_bn.cli.session import Session, load_checkpoint

__all__ = ["recalibrate"]


def recalibrate(
    *,
    config: Sequence[Path],
    ckpt_path: Path,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    num_batches: int = 200,
    tolerance: float | None = None,
    exact: bool = False,
    dataloader: str = "train",
    layers: Sequence[str] | None = None,
    model: str | None = None,
    data: str | None = None,
    cli: str | None = None,
    weights_only: bool = True,
    json: bool = False,
) -> int:
    """Write a checkpoint with running statistics that match its weights; all else in it is that of `ckpt_path`."""
    target = output or ckpt_path.with_name(f"{ckpt_path.stem}-recalibrated{ckpt_path.suffix}")
    checkpoint = load_checkpoint(ckpt_path, weights_only=weights_only)
    if not target.parent.is_dir():
        raise UsageError(f"there is no directory {target.parent} to write {target.name} into.")
    session = Session(config, overrides, checkpoint, model=model, data=data, cli=cli)
    # After the config, whose mistakes are of more interest than a file that is there.
    if not dry_run and target.exists() and not overwrite:
        raise RefusedError(f"{target} exists. Pass --output with another name, or --overwrite.")
    report, statistics = session.recalibrate(
        dataloader, layers, num_batches=num_batches, tolerance=tolerance, exact=exact, dry_run=dry_run
    )
    if session.trainer.is_global_zero:
        if not dry_run:
            checkpoint["state_dict"].update(statistics)
            write_atomically(checkpoint, target)
        _tell(report, None if dry_run else target, json)
    return OK


def _tell(report: Any, target: Path | None, json: bool) -> None:
    if json:
        print_json({**report.as_dict(), "output": None if target is None else str(target)})
        return
    print(report)
    print("Nothing was written." if target is None else f"Written: {target}")
