"""Batch normalization for PyTorch Lightning: running statistics that can be chosen, watched, guarded and repaired."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_bn.activations.episodes import Episode as Episode
    from lightning_bn.activations.metric import ActivationStats as ActivationStats
    from lightning_bn.averaging import Averaging as Averaging
    from lightning_bn.averaging import Batch as Batch
    from lightning_bn.averaging import Cumulative as Cumulative
    from lightning_bn.averaging import Exponential as Exponential
    from lightning_bn.averaging import Window as Window
    from lightning_bn.callbacks.activation_stats import ActivationStatsMonitor as ActivationStatsMonitor
    from lightning_bn.callbacks.comparison import CompareAverages as CompareAverages
    from lightning_bn.callbacks.conversion import ConvertBatchNorm as ConvertBatchNorm
    from lightning_bn.callbacks.drift_monitor import DriftMonitor as DriftMonitor
    from lightning_bn.callbacks.freezing import FreezeBatchNorm as FreezeBatchNorm
    from lightning_bn.callbacks.mode_check import ModeCheck as ModeCheck
    from lightning_bn.callbacks.recalibration import BatchNormRecalibration as BatchNormRecalibration
    from lightning_bn.callbacks.synchronisation import BatchNormSync as BatchNormSync
    from lightning_bn.exports.exporting import exporting as exporting
    from lightning_bn.exports.running import check_export as check_export
    from lightning_bn.layers.batch_norm import BatchNorm1d as BatchNorm1d
    from lightning_bn.layers.batch_norm import BatchNorm2d as BatchNorm2d
    from lightning_bn.layers.batch_norm import BatchNorm3d as BatchNorm3d
    from lightning_bn.layers.conversion import convert_batch_norm as convert_batch_norm
    from lightning_bn.layers.conversion import to_torch as to_torch
    from lightning_bn.layers.deferred import settle_together as settle_together
    from lightning_bn.live_data.judging import drift as drift
    from lightning_bn.live_data.report import DriftReport as DriftReport
    from lightning_bn.live_data.report import LayerDeviation as LayerDeviation
    from lightning_bn.live_data.watching import DriftWatch as DriftWatch
    from lightning_bn.live_data.watching import watch_drift as watch_drift
    from lightning_bn.modes import paused_statistics as paused_statistics
    from lightning_bn.recalibration import recalibrate as recalibrate
    from lightning_bn.recalibration import recalibrated as recalibrated
    from lightning_bn.recalibration.report import LayerReport as LayerReport
    from lightning_bn.recalibration.report import RecalibrationReport as RecalibrationReport
    from lightning_bn.recalibration.spread import keep_spread as keep_spread
    from lightning_bn.rules import Finding as Finding
    from lightning_bn.rules import Fix as Fix
    from lightning_bn.rules import ModeCheckError as ModeCheckError
    from lightning_bn.rules.watching import check as check
    from lightning_bn.rules.watching import watch as watch
    from lightning_bn.sets.statistics_sets import StatisticsSets as StatisticsSets

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
    "DriftMonitor",
    "DriftReport",
    "DriftWatch",
    "Episode",
    "Exponential",
    "Finding",
    "Fix",
    "FreezeBatchNorm",
    "LayerDeviation",
    "LayerReport",
    "ModeCheck",
    "ModeCheckError",
    "RecalibrationReport",
    "StatisticsSets",
    "Window",
    "check",
    "check_export",
    "convert_batch_norm",
    "drift",
    "exporting",
    "keep_spread",
    "paused_statistics",
    "recalibrate",
    "recalibrated",
    "settle_together",
    "to_torch",
    "watch",
    "watch_drift",
]

# Every name, and the module it is in: imported when first asked for. TensorBoard imports this package for its tab's
# sake, and must not wait for torch; who uses the layers must not wait for Lightning.
_LAZY: dict[str, str] = {
    "ActivationStats": "activations.metric",
    "ActivationStatsMonitor": "callbacks.activation_stats",
    "Averaging": "averaging",
    "Batch": "averaging",
    "BatchNorm1d": "layers.batch_norm",
    "BatchNorm2d": "layers.batch_norm",
    "BatchNorm3d": "layers.batch_norm",
    "BatchNormRecalibration": "callbacks.recalibration",
    "BatchNormSync": "callbacks.synchronisation",
    "CompareAverages": "callbacks.comparison",
    "ConvertBatchNorm": "callbacks.conversion",
    "Cumulative": "averaging",
    "DriftMonitor": "callbacks.drift_monitor",
    "DriftReport": "live_data.report",
    "DriftWatch": "live_data.watching",
    "Episode": "activations.episodes",
    "Exponential": "averaging",
    "Finding": "rules",
    "Fix": "rules",
    "FreezeBatchNorm": "callbacks.freezing",
    "LayerDeviation": "live_data.report",
    "LayerReport": "recalibration.report",
    "ModeCheck": "callbacks.mode_check",
    "ModeCheckError": "rules",
    "RecalibrationReport": "recalibration.report",
    "StatisticsSets": "sets.statistics_sets",
    "Window": "averaging",
    "check": "rules.watching",
    "check_export": "exports.running",
    "convert_batch_norm": "layers.conversion",
    "drift": "live_data.judging",
    "exporting": "exports.exporting",
    "keep_spread": "recalibration.spread",
    "paused_statistics": "modes",
    "recalibrate": "recalibration",
    "recalibrated": "recalibration",
    "settle_together": "layers.deferred",
    "to_torch": "layers.conversion",
    "watch": "rules.watching",
    "watch_drift": "live_data.watching",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
