"""How a stream of batch moments becomes running statistics: exponential, cumulative and windowed averages."""

from lightning_bn.averaging.base import Averaging, Batch, check_averaging
from lightning_bn.averaging.exponential import Cumulative, Exponential
from lightning_bn.averaging.window import Window

__all__ = ["Averaging", "Batch", "Cumulative", "Exponential", "Window", "check_averaging"]
