"""What the findings BN401 to BN405 print is executed as printed, and mends."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_programs import BATCH, Network, network, runner

from lightning_bn import Finding, check_export, exporting, recalibrate

Export = Callable[[Network, Path], Any]


def by_onnx(model: Network, path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (BATCH,), str(path), dynamo=False, training=torch.onnx.TrainingMode.PRESERVE)
    return runner(path)


def by_torch(model: Network, path: Path) -> Any:
    torch.export.save(torch.export.export(model, (BATCH,)), path.with_suffix(".pt2"))
    return runner(path.with_suffix(".pt2"))


def in_training_mode(model: Network, path: Path) -> Any:
    model.train().body[7].p = 0.0
    return by_onnx(model, path)


def with_dropout(model: Network, path: Path) -> Any:
    model.body[7].train()
    return by_onnx(model, path)


def writing(model: Network, path: Path) -> Any:
    return by_torch(model.train(), path)


def before_recalibration(model: Network, path: Path) -> Any:
    run = by_onnx(model, path)
    recalibrate(model, [BATCH + 1], progress=False)
    return run


def not_finite(model: Network, path: Path) -> Any:
    model.body[1].running_var[0] = float("nan")
    return by_onnx(model, path)


WRONG: dict[str, Export] = {
    "BN401": in_training_mode,
    "BN402": with_dropout,
    "BN403": before_recalibration,
    "BN404": writing,
    "BN405": not_finite,
}


@pytest.mark.parametrize("code", WRONG)
def test_the_printed_fix_mends(code: str, tmp_path: Path) -> None:
    """Of the wrong program of each code; where the fix exports nothing itself, it goes before the export."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model, path = network(), tmp_path / "program.onnx"
    (finding,) = of(code, check_export(WRONG[code](model, path), model, BATCH))
    names = {"model": model, "batch": BATCH, "batches": [BATCH], "path": str(path)}
    exec(finding.fix.code, names | {"torch": torch, "exporting": exporting, "recalibrate": recalibrate})
    if "export" not in finding.fix.code:
        with exporting(model):
            by_onnx(model, path)
    assert check_export(runner(path), model, BATCH) == []


def of(code: str, found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.code == code]
