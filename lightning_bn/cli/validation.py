"""``lightning-bn validate``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lightning_bn.cli.output import OK, print_json, print_table
from lightning_bn.cli.session import Session, load_checkpoint

__all__ = ["validate"]


def validate(
    *,
    config: Sequence[Path],
    ckpt_path: Path,
    overrides: Sequence[str] = (),
    compare: bool = False,
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
    """Validate a checkpoint under its own statistics and, to `compare`, under recalibrated ones and under the
    batches'."""
    checkpoint = load_checkpoint(ckpt_path, weights_only=weights_only)
    session = Session(config, overrides, checkpoint, model=model, data=data, cli=cli)
    results = {"checkpoint": session.validate({})}
    if compare:
        _, statistics = session.recalibrate(
            dataloader, layers, num_batches=num_batches, tolerance=tolerance, exact=exact
        )
        results["recalibrated"] = session.validate(statistics)
        results["batch statistics"] = session.validate({}, with_batches=True)
    if session.trainer.is_global_zero:
        print_json(_finite(results)) if json else _print(results)
    return OK


def _finite(results: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """JSON has no NaN."""
    return {
        column: {name: value if math.isfinite(value) else None for name, value in row.items()}
        for column, row in results.items()
    }


def _print(results: dict[str, dict[str, float]]) -> None:
    metrics = list(results["checkpoint"])
    print_table(
        ("metric", *results), [(name, *(f"{column[name]:.4g}" for column in results.values())) for name in metrics]
    )
