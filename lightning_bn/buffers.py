"""The tensors of a batch-norm layer that keeps running statistics, typed as what they are in such a layer.

torch declares each of them as ``Tensor | None``, since a layer with ``track_running_stats=False`` has none. Who knows
that a layer has them asks here, once, and is told so if it is not true.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


def running_mean(layer: _BatchNorm) -> Tensor:
    """Return ``layer.running_mean``, (C,)."""
    mean = layer.running_mean
    return _missing(layer) if mean is None else mean


def running_var(layer: _BatchNorm) -> Tensor:
    """Return ``layer.running_var``, (C,)."""
    var = layer.running_var
    return _missing(layer) if var is None else var


def running_statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return ``layer.running_mean`` and ``layer.running_var``, (C,) each.

    Example:
        >>> from torch import nn
        >>> running_statistics(nn.BatchNorm1d(2))
        (tensor([0., 0.]), tensor([1., 1.]))
    """
    return running_mean(layer), running_var(layer)


def next_step(layer: _BatchNorm) -> Tensor:
    """Return the number of the batch that comes next, 1 for the first; (), int64."""
    tracked = layer.num_batches_tracked
    return _missing(layer) if tracked is None else tracked + 1


def _missing(layer: _BatchNorm) -> Tensor:
    raise TypeError(f"{layer} keeps no running statistics (track_running_stats=False), which are needed here.")
