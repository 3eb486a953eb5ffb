"""Batch normalization for PyTorch Lightning: running statistics that can be chosen, watched, guarded and repaired."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_bn.averaging import Averaging, Batch, Cumulative, Exponential, Window, window
from lightning_bn.layers import batch_norm, subclasses
from lightning_bn.layers.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from lightning_bn.layers.conversion import convert_batch_norm, to_torch
from lightning_bn.layers.ledger import settle_together
from lightning_bn.modes import paused_statistics
from lightning_bn.recalibration import recalibrate, recalibrated
from lightning_bn.recalibration.report import LayerReport, RecalibrationReport
from lightning_bn.rules import Finding, Fix, ModeCheckError
from lightning_bn.rules.watching import check, watch

if TYPE_CHECKING:
    from lightning_bn.activations.episodes import Episode as Episode
    from lightning_bn.activations.stats import ActivationStats as ActivationStats
    from lightning_bn.callbacks.activation_stats import ActivationStatsMonitor as ActivationStatsMonitor
    from lightning_bn.callbacks.comparison import CompareAverages as CompareAverages
    from lightning_bn.callbacks.conversion import ConvertBatchNorm as ConvertBatchNorm
    from lightning_bn.callbacks.mode_check import ModeCheck
    from lightning_bn.callbacks.recalibration import BatchNormRecalibration as BatchNormRecalibration
    from lightning_bn.plugins.layer_sync import BatchNormSync as BatchNormSync

__version__ = "0.1.0"

__all__ = [
    "ActivationStats",
    "ActivationStatsMonitor",
    "Averaging",
    "Batch",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormRecalibration",
    "BatchNormSync",
    "CompareAverages",
    "ConvertBatchNorm",
    "Cumulative",
    "Episode",
    "Exponential",
    "Finding",
    "Fix",
    "LayerReport",
    "ModeCheck",
    "ModeCheckError",
    "RecalibrationReport",
    "Window",
    "check",
    "convert_batch_norm",
    "paused_statistics",
    "recalibrate",
    "recalibrated",
    "settle_together",
    "to_torch",
    "watch",
]

# A whole model that 0.1.0 pickled names the modules that these classes were in then.
for _name, _module in {"batch_norm": batch_norm, "subclasses": subclasses, "window": window}.items():
    sys.modules[f"{__name__}.{_name}"] = _module

# Names that need lightning or torchmetrics, and the module of each: imported when first asked for, since those take
# seconds.
_LAZY: dict[str, str] = {
    "ActivationStats": "lightning_bn.activations.stats",
    "Episode": "lightning_bn.activations.episodes",
    "ActivationStatsMonitor": "lightning_bn.callbacks.activation_stats",
    "ModeCheck": "lightning_bn.callbacks.mode_check",
    "BatchNormRecalibration": "lightning_bn.callbacks.recalibration",
    "CompareAverages": "lightning_bn.callbacks.comparison",
    "ConvertBatchNorm": "lightning_bn.callbacks.conversion",
    "BatchNormSync": "lightning_bn.plugins.layer_sync",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
