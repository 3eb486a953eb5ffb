"""Any batch-norm layer into one with an averaging, and back into plain torch.nn."""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging import Averaging
from lightning_bn.buffers import running_statistics
from lightning_bn.discovery import BatchNormLayer, find_batch_norms
from lightning_bn.layers import subclasses
from lightning_bn.layers.batch_norm import AveragedBatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, check_averaging
from lightning_bn.layers.ledger import release as release_ledger
from lightning_bn.layers.ledger import settle_together
from lightning_bn.layers.trial import why_unsupported
from lightning_bn.sharding import check_not_distributed

__all__ = ["convert_batch_norm", "to_torch"]

_OURS: dict[type[_BatchNorm], type[_BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}


M = TypeVar("M", bound=nn.Module)


def convert_batch_norm(module: M, averaging: Averaging | None = None) -> M:
    """Give every batch-norm layer in `module` the averaging, in place.

    A `torch.nn.BatchNorm1d/2d/3d` becomes this package's; it stays the same object, so parameters, buffers, hooks,
    training flags, ``requires_grad``, device, dtype, names, and optimizers built before stay as they are. A third-party
    subclass (timm's ``BatchNormAct2d``, torch's ``SyncBatchNorm``) keeps its class and its own forward, and gets the
    averaging around it.

    Args:
        module: a model, or a layer.
        averaging: each layer keeps its own copy. None: torch's rule, by the layer's ``momentum``, for torch's and this
            package's layers.

    Returns:
        `module` itself. A module without batch norm causes a warning.

    Raises:
        TypeError: a layer is not supported; it is named, with the reason, and nothing was changed.

    Lazy and quantization-aware layers are out of scope: initialise the former first, convert before preparing the
    latter.

    Example:
        >>> from torch import nn
        >>> from lightning_bn import Window, convert_batch_norm
        >>> convert_batch_norm(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)), Window(20))[1]
        BatchNorm2d(
          8, eps=1e-05, affine=True, ...track_running_stats=True
          (averaging): Window(size=20)
        )
    """
    if averaging is not None:
        check_averaging(averaging, f"convert_batch_norm(module, {averaging!r})")
    layers = find_batch_norms(module)
    check_not_distributed(layers, f"convert_batch_norm(module, {averaging!r})")
    refused = [(layer, reason) for layer in layers if (reason := _refusal(layer.module, averaging))]
    if refused:
        raise TypeError(
            f"convert_batch_norm(module, {averaging!r}) can't attach the averaging to {_listing(refused)}. Nothing was "
            f"changed."
        )
    if not layers:
        warnings.warn(
            f"convert_batch_norm({type(module).__name__}(...), {averaging!r}) finds no batch-norm layer, and converts "
            "nothing. Call it after the model is built; other normalisations, such as LayerNorm, have no running "
            "statistics.",
            stacklevel=2,
        )
    for layer in layers:
        _convert(layer.module, averaging)
    settle_together(module)
    return module


def to_torch(module: M) -> M:
    """Turn every layer of this package in `module` into plain ``torch.nn``, in place; the inverse of
    `convert_batch_norm`.

    The running statistics, which hold the selected average at all times, stay; the averaging and its history go. Use it
    before quantization, ``torch.fx``, or to save a ``state_dict`` that a model without this package loads with
    ``strict=True``. To keep the training model, pass ``copy.deepcopy(model)``.

    Returns:
        `module` itself.

    Raises:
        TypeError: a subclass of this package's layers, which has no counterpart; nothing was changed.

    Example:
        >>> from lightning_bn import BatchNorm2d, Window, to_torch
        >>> to_torch(BatchNorm2d(8, averaging=Window(20)))
        BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, ...track_running_stats=True)
    """
    layers = find_batch_norms(module)
    refused = [
        (layer, "it subclasses this package's layer; there is no torch.nn class with its forward")
        for layer in layers
        if isinstance(layer.module, AveragedBatchNorm) and type(layer.module) not in _TORCHS
    ]
    if refused:
        raise TypeError(f"to_torch(module) can't turn {_listing(refused)}. Nothing was changed.")
    for layer in layers:
        _revert(layer.module)
    for each in module.modules():
        release_ledger(each)
    return module


def _refusal(layer: _BatchNorm, averaging: Averaging | None) -> str | None:
    if isinstance(layer, AveragedBatchNorm) or (type(layer) in _OURS and not _has_own_forward(layer)):
        return "it keeps no running statistics" if averaging is not None and layer.running_mean is None else None
    return why_unsupported(layer) if averaging is not None else None


def _has_own_forward(layer: _BatchNorm) -> bool:
    """Whether the layer runs another forward than its class's, as one does that has been given accelerate's hooks or is
    patched."""
    forward = layer.__dict__.get("forward")
    return forward is not None and not getattr(forward, "follows_class", False)


def _convert(layer: _BatchNorm, averaging: Averaging | None) -> None:
    ours = None if _has_own_forward(layer) else _OURS.get(type(layer))
    if ours is not None:
        subclasses.detach_averaging(layer)
        # A change of class and not a new module: whoever holds the layer (optimizers, hooks, lists) holds the converted
        # one.
        layer.__class__ = ours
        layer.__dict__["skip_nonfinite"] = True
    if isinstance(layer, AveragedBatchNorm):
        layer.adopt(averaging)
    elif averaging is None:
        subclasses.detach_averaging(layer)
    else:
        subclasses.attach_averaging(layer, averaging)


def _revert(layer: _BatchNorm) -> None:
    subclasses.detach_averaging(layer)
    torchs = _TORCHS.get(type(layer))
    if torchs is not None:
        momentum = layer.momentum
        del layer.averaging, layer.skip_nonfinite, layer._momentum
        layer.__class__ = torchs
        layer.momentum = momentum
        if layer.weight is not None and layer.running_mean is not None:
            # torch's kernel takes 16-bit parameters next to no other statistics than 16-bit ones.
            for buffer in running_statistics(layer):
                buffer.data = buffer.data.to(layer.weight.dtype)


def _listing(refused: list[tuple[BatchNormLayer, str]]) -> str:
    return "; ".join(f"{layer.name or 'the module itself'} ({layer.kind}): {reason}" for layer, reason in refused)
