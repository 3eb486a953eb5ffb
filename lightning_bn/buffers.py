"""The tensors of a batch-norm layer that keeps running statistics, typed as what they are in such a layer.

torch declares each of them as ``Tensor | None``, since a layer with ``track_running_stats=False`` has none. Who knows
that a layer has them asks here, once, and is told so if it is not true.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.torch_internals import parameters_of


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


def affine(layer: _BatchNorm) -> tuple[Tensor | None, Tensor | None]:
    """Return the weight and the bias that a forward of the layer uses now, (C,) each, or None.

    They are read as attributes: a pruned weight is a plain tensor that a hook computes before each forward, a
    parametrized one a property, one that another network makes any tensor. A weight that is a parameter, as most are,
    is found sooner in the dict of these.
    """
    parameters = parameters_of(layer)
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    return layer.weight, layer.bias


def next_step(layer: _BatchNorm) -> Tensor:
    """Return the number of the batch that comes next, 1 for the first; (), int64."""
    tracked = layer.num_batches_tracked
    return _missing(layer) if tracked is None else tracked + 1


def _missing(layer: _BatchNorm) -> Tensor:
    raise TypeError(f"{layer} keeps no running statistics (track_running_stats=False), which are needed here.")
