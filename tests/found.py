"""What `ModeCheck` finds in a small fit."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from fitting import fit, quiet
from small_data import data
from torch.utils.data import DataLoader

from lightning_bn import Finding, ModeCheck


def findings(
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    loader: DataLoader[Any] | None = None,
    check: ModeCheck | None = None,
    **options: Any,
) -> list[Finding]:
    """Fit `module` for an epoch with a validation after it, and return what `ModeCheck` found."""
    check = check or ModeCheck(action="log")
    once = {"max_epochs": 1, **options}
    with quiet():
        fit(*callbacks, check, module=module, train=loader or data(), val=data(batches=2), **once)
    return check.findings


def serious(found: list[Finding]) -> list[str]:
    """Return the codes of the findings above information."""
    return [finding.code for finding in found if finding.level != "info"]


def of(code: str, found: list[Finding]) -> list[Finding]:
    """Return the findings of one rule."""
    return [finding for finding in found if finding.code == code]


def only(code: str, found: list[Finding]) -> Finding:
    """Return the one finding of `code`."""
    (finding,) = of(code, found)
    return finding
