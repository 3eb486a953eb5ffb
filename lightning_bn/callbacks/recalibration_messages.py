"""What `BatchNormRecalibration` says of its arguments, and of models without a layer to recalibrate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning_bn.callbacks.both_lightnings import CombinedLoader
from lightning_bn.callbacks.checkpoint_files import KINDS
from lightning_bn.discovery import BatchNormLayer, learning

__all__ = ["check_arguments", "why_none_learns"]


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
