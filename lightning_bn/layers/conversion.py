"""Any batch-norm layer into one with an averaging, and back into plain torch.nn."""

from __future__ import annotations

import copy
import warnings
from contextlib import ExitStack
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from lightning_bn.averaging import Averaging, check_averaging
from lightning_bn.averaging.base import TrainingState
from lightning_bn.buffers import running_mean, running_statistics, running_var
from lightning_bn.discovery import BatchNormLayer, find_batch_norms, find_unserved, has_known_forward, unserved
from lightning_bn.layers import subclasses
from lightning_bn.layers.batch_norm import AveragedBatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from lightning_bn.layers.deferred import release, settle_together
from lightning_bn.layers.subclasses import StandIns
from lightning_bn.modes import kept_attribute, out_of_inference_mode
from lightning_bn.sharding import check_not_distributed

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
    call = f"convert_batch_norm(module, {averaging!r})"
    if averaging is not None:
        check_averaging(averaging, call)
    layers = find_batch_norms(module)
    left_out = [norm for norm in find_unserved(module) if averaging is not None and not norm.is_constant]
    check_not_distributed(layers, call)
    refused = [_listing(layer, reason) for layer in layers if (reason := _refusal(layer.module, averaging))]
    refused += [str(norm) for norm in left_out if isinstance(norm.module, _BatchNorm)]
    if refused:
        raise TypeError(f"{call} can't attach the averaging to {'; '.join(refused)}. Nothing was changed.")
    if left_out:
        warnings.warn(f"{call} leaves out {'; '.join(map(str, left_out))}.", stacklevel=2)
    elif not layers:
        warnings.warn(
            f"convert_batch_norm({type(module).__name__}(...), {averaging!r}) finds no batch-norm layer, and converts "
            "nothing. Call it after the model is built; other normalisations, such as LayerNorm, have no running "
            f"statistics.{unserved(module, constant=True)}",
            stacklevel=2,
        )
    with out_of_inference_mode():
        for layer in layers:
            _convert(layer.module, averaging)
    settle_together(module)
    return module


def to_torch(module: M) -> M:
    """Turn every layer of this package in `module` into plain ``torch.nn``, in place; the inverse of
    `convert_batch_norm`.

    The running statistics, which hold the selected average at all times, stay; the averaging, its history and the
    spread of images go. Use it before quantization, ``torch.fx``, or to save a ``state_dict`` that a model without this
    package loads with ``strict=True``. To keep the training model, pass ``copy.deepcopy(model)``.

    Returns:
        `module` itself.

    Raises:
        TypeError: a subclass of this package's layers, which has no counterpart, or one that was parametrized after it
            was converted; nothing was changed.

    Example:
        >>> from lightning_bn import BatchNorm2d, Window, to_torch
        >>> to_torch(BatchNorm2d(8, averaging=Window(20)))
        BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, ...track_running_stats=True)
    """
    layers = find_batch_norms(module)
    refused = [
        _listing(layer, _why_no_counterpart(layer.module))
        for layer in layers
        if isinstance(layer.module, AveragedBatchNorm) and type(layer.module) not in _TORCHS
    ]
    if refused:
        raise TypeError(f"to_torch(module) can't turn {'; '.join(refused)}. Nothing was changed.")
    for layer in layers:
        with out_of_inference_mode():
            _revert(layer.module)
        for name, child in list(layer.module.named_children()):
            if isinstance(child, TrainingState):
                delattr(layer.module, name)
    for each in module.modules():
        release(each)
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
    subclasses.detach_averaging(layer)
    if ours is not None:
        # A change of class and not a new module: whoever holds the layer (optimizers, hooks, lists) holds the converted
        # one.
        layer.__class__ = ours
        layer.__dict__["skip_nonfinite"] = True
    if isinstance(layer, AveragedBatchNorm):
        layer.adopt(averaging)
    elif averaging is not None:
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


def _why_no_counterpart(layer: AveragedBatchNorm) -> str:
    if is_parametrized(layer):  # by which torch gives the layer a class of its own
        names = list(layer.parametrizations)  # type: ignore[arg-type]  # for torch any attribute may be a module
        removals = "; ".join(f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})" for name in names)
        return f"its {' and '.join(names)} was parametrized after it was converted; call {removals} first"
    return "it subclasses this package's layer; there is no torch.nn class with its forward"


def _listing(layer: BatchNormLayer, reason: str) -> str:
    return f"{layer.name or 'the module itself'} ({layer.kind}): {reason}"


def why_unsupported(layer: _BatchNorm) -> str | None:
    """Say why the subclass is not supported, or None if it is, after one forward of a copy with scratch buffers.

    Whether a forward hands its buffers and its momentum to the kernel can't be seen from outside; whether they hold the
    batch's moments afterwards can. It is tried once for a class and its settings.
    """
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy and has no buffers yet; run a batch through the model first"
    if layer.running_mean is None:
        return "it keeps no running statistics"
    if layer.num_batches_tracked is None:
        return "it does not count its batches (num_batches_tracked is None)"
    if isinstance(layer, nn.SyncBatchNorm):  # torch's own follows the pattern; one rank alone can't try it out
        return None
    if "forward" in layer.__dict__:
        return _tried(layer)  # one of its own, of which its class tells nothing
    known = _TRIED.setdefault(type(layer), {})
    settings = frozenset(
        (name, value) for name, value in vars(layer).items() if name != "training" and isinstance(value, (bool, str))
    )
    if settings not in known:
        known[settings] = _tried(layer)
    return known[settings]


_TRIED: WeakKeyDictionary[type, dict[frozenset[tuple[str, bool | str]], str | None]] = WeakKeyDictionary()


def _tried(layer: _BatchNorm) -> str | None:
    # A forward that was put on the layer from outside may go on meaning this layer when it is copied.
    if "forward" not in layer.__dict__ or running_mean(layer).is_meta:
        layer = _plain_copy(layer)
    stand_ins = StandIns(layer, None, zeroed=True)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.no_grad())
        for name in ("training", "track_running_stats"):
            stack.enter_context(kept_attribute([layer], name))
            setattr(layer, name, True)
        stack.callback(stand_ins.undo, layer)
        stand_ins.make(layer)
        return _judge(layer)


def reads_running_mean(layer: _BatchNorm) -> bool:
    """Whether an eval forward of a subclass depends on ``running_mean``, by two of a copy; True where that can't be
    tried.

    A norm that subtracts no mean, as those of networks without biases, inherits the buffer and leaves it alone.
    """
    if has_known_forward(layer) or "forward" in layer.__dict__ or layer.running_mean is None:
        return True
    try:
        twin = _plain_copy(layer).eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            data = _trial_batch(twin)
            before = twin.forward(data)
            running_mean(twin).add_(1.0)
            return not torch.equal(twin.forward(data), before)
    except Exception:  # another's forward may raise anything
        return True


def _plain_copy(layer: _BatchNorm) -> _BatchNorm:
    # A pruned weight is what a hook has computed, which deepcopy refuses.
    derived = {id(value): value.detach() for value in vars(layer).values() if isinstance(value, Tensor)}
    twin = copy.deepcopy(layer, derived)
    return (twin.to_empty(device="cpu") if running_mean(layer).is_meta else twin).cpu().float()


def _judge(layer: _BatchNorm) -> str | None:
    data = _trial_batch(layer)
    try:
        layer.forward(data)
    except Exception as error:  # another's forward may raise anything; the reason is passed on
        return f"its forward, tried on a batch of shape {tuple(data.shape)}, raised {type(error).__name__}: {error}"
    var, mean = torch.var_mean(data, [0, *range(2, data.dim())], unbiased=True)
    if torch.allclose(running_mean(layer), mean, atol=1e-4) and torch.allclose(running_var(layer), var, rtol=1e-3):
        return None
    return "its forward does not leave the batch's mean and unbiased variance in its buffers when momentum is 1"


def _trial_batch(layer: _BatchNorm) -> Tensor:
    rank = 2 if isinstance(layer, nn.BatchNorm1d) else 5 if isinstance(layer, nn.BatchNorm3d) else 4
    data = torch.randn(4, layer.num_features, *[3] * (rank - 2)) + torch.arange(4.0).reshape(4, *[1] * (rank - 1))
    return data.to(running_mean(layer).device)
