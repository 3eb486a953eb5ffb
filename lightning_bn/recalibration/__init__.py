"""Running statistics estimated anew with the weights fixed: exact, and all or nothing."""

from lightning_bn.recalibration.report import LayerReport, RecalibrationReport
from lightning_bn.recalibration.run import recalibrate, recalibrated

__all__ = ["LayerReport", "RecalibrationReport", "recalibrate", "recalibrated"]
