"""What the images of one batch say, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_bn.tables import html_table, text_table


@dataclass(frozen=True)
class LayerDeviation:
    """How far the images' moments at one layer are from those of the images of the spread."""

    __module__ = "lightning_bn"

    name: str
    """Its first path in the model; the empty string where the model itself is the layer."""
    kind: str
    """The name of its class."""
    z: float
    """The deviation, less its average by chance, in standard deviations by chance; large for drift, and never large for
    images that are more alike than by chance."""
    p: float
    """The share of as many images by chance that deviate as much at this layer."""
    deviates: bool
    """Whether `z` is beyond the limit of the network, which holds for all layers together."""


@dataclass(frozen=True)
class DriftReport:
    """The outcome of `drift`; prints as a table, the layers in the order in which they ran."""

    __module__ = "lightning_bn"

    images: int
    """Of the batch."""
    z: float
    """The largest of the layers."""
    p: float
    """The share of as many images by chance whose largest z is as large, over the layers that were judged. Never below
    ``1 / (spread_images + 1)``, however far the images are away."""
    alarm: float
    """The rate of false alarms that was asked for."""
    limit: float
    """The z beyond which `p` is at most `alarm`."""
    spread_images: int
    """How many images chance is drawn from."""
    layers: tuple[LayerDeviation, ...]
    """Those that were judged, in the order in which they ran."""
    not_judged: tuple[str, ...]
    """The other layers with running statistics, each with the reason."""

    @property
    def is_alarm(self) -> bool:
        """Whether `p` is at most `alarm`."""
        return self.p <= self.alarm

    @property
    def first(self) -> str | None:
        """The name of the first layer that deviates; None if none does."""
        return next((layer.name for layer in self.layers if layer.deviates), None)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain numbers, strings, lists and dicts."""
        plain = {**asdict(self), "is_alarm": self.is_alarm, "first": self.first}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def __str__(self) -> str:
        return "\n".join([self._headline(), *text_table(_HEADER, self._rows(), left=2)])

    def _repr_html_(self) -> str:
        return html_table(self._headline(), _HEADER, self._rows())

    def _headline(self) -> str:
        least = 1 / (self.spread_images + 1)
        share = f"p = {self.p:.2g}" if self.p > least else f"p at most {least:.2g}"
        what = "Drift" if self.is_alarm else "No drift"
        found = f"z = {self.z:.3g}, {share} (alarm at {self.alarm:g}, z > {self.limit:.3g})"
        parts = [f"{what}: {self.images} images, {found}."]
        if self.first is not None:
            parts.append(f"First layer that deviates: {self.first or '(the model)'}.")
        if self.not_judged:
            parts.append(f"Not judged: {'; '.join(self.not_judged)}.")
        return " ".join(parts)

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (layer.name or "(the model)", layer.kind, f"{layer.z:.3g}", f"{layer.p:.2g}", "deviates" * layer.deviates)
            for layer in self.layers
        ]


_HEADER = ("layer", "kind", "z", "p", "")
