"""What a recalibration did, layer by layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

from lightning_bn.recalibration.transaction import Change, completely, undo
from lightning_bn.tables import html_table, text_table


@dataclass(frozen=True)
class LayerReport:
    """What one layer saw, and how far its statistics moved. The unit of the mean is ``sqrt(old var + eps)``, by which
    the layer divided."""

    __module__ = "lightning_bn"

    name: str
    """Its first path in the model; the empty string where the model itself is the layer."""
    kind: str
    """The name of its class."""
    samples: int
    """Length of its inputs' first dimension, added up over calls and ranks, without what was not finite."""
    batches: int
    mean_shift_max: float
    """Largest ``|new mean - old mean| / sqrt(old var + eps)`` over channels."""
    mean_shift_rms: float
    log_variance_ratio_max: float
    """Largest ``|log((new var + eps) / (old var + eps))|`` over channels."""
    log_variance_ratio_rms: float
    standard_error: float
    """Of the mean, in units of the data's standard deviation, from the spread between batches, rms over channels; NaN
    for one batch."""

    @property
    def shift(self) -> float:
        """The larger of the two rms values, by which the worst layer is told; infinite where the old statistics were
        not finite."""
        worst = max(self.mean_shift_rms, self.log_variance_ratio_rms)
        return worst if math.isfinite(self.mean_shift_rms + self.log_variance_ratio_rms) else math.inf


@dataclass(frozen=True)
class RecalibrationReport:
    """The outcome of `recalibrate`; prints as a table, the worst layers first."""

    __module__ = "lightning_bn"

    batches: int
    """Batches that went through the model, on all ranks."""
    samples: int
    """Length of the first dimension of what the first layer of each batch got, added up."""
    skipped: int
    """Batches that some layer left out because their moments were not finite."""
    layers: tuple[LayerReport, ...]
    """The layers with new statistics, in the order of the model."""
    not_run: tuple[str, ...]
    """Names of the chosen layers that saw no data and keep their statistics."""
    stopped_by: str
    """What ended the pass: "num_batches", "tolerance", or "end", that is, `batches` had no more."""
    num_batches: int | None
    """As asked for, on each rank."""
    tolerance: float | None
    """As asked for."""
    dry_run: bool
    gone: tuple[str, ...] = field(default=(), kw_only=True)
    """Names of the layers that learned in the fit and that the model no longer has; a callback knows them."""
    not_supported: tuple[str, ...] = field(default=(), kw_only=True)
    """Norms of the model that hold running statistics and are not batch norms that can be recalibrated, each with the
    reason; none where `layers` chooses."""
    spilled: int = field(default=0, kw_only=True)
    """Bytes of activations that `exact` kept in a temporary file at most, on all ranks."""
    spread_images: int = field(default=0, kw_only=True)
    """Images from which ``spread=True`` has drawn, 2,000 at most; 0 without it."""
    no_spread: tuple[str, ...] = field(default=(), kw_only=True)
    """The layers for which `drift` has no spread, each with the reason."""
    _changes: tuple[Change, ...] = field(repr=False, compare=False)

    def rollback(self) -> None:
        """Write the statistics from before the recalibration back into the layers, in place and bit-identical.

        Nothing else was changed, so the model is what it was; an averaging's history was never touched. After a dry run
        there is nothing to undo and nothing happens. Under several ranks each calls it for itself.
        """
        completely(partial(undo, self._changes))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain numbers, strings, lists and dicts; what is not finite is None, as JSON has no
        NaN."""
        found = {each.name: getattr(self, each.name) for each in fields(self) if not each.name.startswith("_")}
        found["layers"] = [
            {name: _finite_or_none(value) for name, value in asdict(each).items()} for each in self.layers
        ]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw how far each layer's statistics were off: rms over channels of the mean's shift, in standard deviations,
        and of the log ratio of the variances. Returns matplotlib's figure and axes, those of `ax` where it is given.
        """
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(6.4, 1.5 + 0.25 * len(self.layers)), layout="constrained").subplots()
        places = range(len(self.layers))
        ax.barh([each - 0.2 for each in places], [layer.mean_shift_rms for layer in self.layers], 0.4, label="mean")
        ratios = [layer.log_variance_ratio_rms for layer in self.layers]
        ax.barh([each + 0.2 for each in places], ratios, 0.4, label="log of the variance")
        ax.set_yticks(places, [layer.name or "(the model)" for layer in self.layers])
        ax.invert_yaxis()
        ax.set_xlabel("change, rms over channels")
        ax.legend()
        return ax.figure, ax

    def __str__(self) -> str:
        return "\n".join([self._headline(), *text_table(_HEADER, self._rows(), left=2)])

    def _repr_html_(self) -> str:
        return html_table(self._headline(), _HEADER, self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        return [_cells(layer) for layer in sorted(self.layers, key=lambda layer: -layer.shift)]

    def _headline(self) -> str:
        done = "Would recalibrate" if self.dry_run else "Recalibrated"
        parts = [f"{done} {len(self.layers)} batch-norm layers from {self.batches} batches, {self.samples} samples."]
        if self.stopped_by == "end" and self.num_batches is not None:
            parts.append(f"The loader ended before the {self.num_batches} batches asked for.")
        if self.tolerance is not None and self.stopped_by != "tolerance":
            parts.append(f"The tolerance {self.tolerance} was not reached.")
        if self.skipped:
            parts.append(f"Not finite and left out: {self.skipped} batches.")
        if self.not_run:
            parts.append(f"Not run, unchanged: {', '.join(self.not_run)}.")
        if self.gone:
            parts.append(f"No longer in the model: {', '.join(self.gone)}.")
        if self.not_supported:
            parts.append(f"Not recalibrated: {'; '.join(self.not_supported)}.")
        if self.spilled:
            parts.append(f"Activations in a temporary file: {self.spilled / 2**20:.0f} MB.")
        if self.spread_images:
            parts.append(f"Spread of {self.spread_images} images kept.")
        if self.no_spread:
            parts.append(f"No spread: {'; '.join(self.no_spread)}.")
        return " ".join(parts)


_HEADER = ("layer", "kind", "samples", "batches", "mean shift max", "rms", "log var ratio max", "rms", "std error")


def _cells(layer: LayerReport) -> tuple[str, ...]:
    values = list(asdict(layer).values())
    return (
        layer.name or "(the model)",
        *(f"{value:.3g}" if isinstance(value, float) else str(value) for value in values[1:]),
    )


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
