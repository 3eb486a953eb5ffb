"""One layer's tensors in one set, while they are not in the layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging import Averaging
from lightning_bn.averaging.base import apply_to_statistics
from lightning_bn.buffers import running_mean, running_statistics
from lightning_bn.modes import out_of_inference_mode
from lightning_bn.torch_internals import is_wrapper

_STATISTICS = ("running_mean", "running_var")
_BUFFERS = (*_STATISTICS, "num_batches_tracked")
_AFFINE = ("weight", "bias")


class SetPart(nn.Module):
    """What `layer` has in one set: running mean and variance, the count, the averaging with its history, and with
    `affine` weight and bias.

    They are in the layer while the set is in place, and here otherwise, so that each tensor is registered once:
    whatever moves, averages, broadcasts or optimises the tensors of a model finds it. A ``state_dict`` has them here in
    either case.

    Args:
        layer: which may have any of its sets in place.
        affine: whether the set has a weight and bias of its own.
    """

    keeps_for_another = True
    """It has buffers named like a norm's, and is none."""

    def __init__(self, layer: _BatchNorm, *, affine: bool) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not as a module of this one
        self._affine = affine
        for name in _BUFFERS:
            self.register_buffer(name, None)
        for name in _AFFINE if affine else ():
            self.register_parameter(name, None)

    @property
    def layer(self) -> _BatchNorm:
        """The layer."""
        layer: _BatchNorm = self.__dict__["_layer"]
        return layer

    @property
    def is_in_place(self) -> bool:
        """Whether the tensors are in the layer."""
        return self._buffers["running_mean"] is None

    def copy_from(self, other: SetPart) -> None:
        """Take copies of what the layer has in another set."""
        holder: nn.Module = other.layer if other.is_in_place else other
        for name in _BUFFERS:
            tensor = holder._buffers[name]
            self._buffers[name] = None if tensor is None else tensor.detach().clone()
        for name in _AFFINE if self._affine else ():
            weight = holder._parameters[name]
            own = None if weight is None else nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            self._parameters[name] = own
        self._take_averaging(copy.deepcopy(holder._modules.get("averaging")))

    def put_in(self, present: SetPart) -> None:
        """Exchange the layer's tensors, which are those of `present`, for these. Neither is written or copied."""
        layer = self.__dict__["_layer"]
        _exchange(_BUFFERS, layer._buffers, present._buffers, self._buffers)
        if self._affine:
            _exchange(_AFFINE, layer._parameters, present._parameters, self._parameters)
        if "averaging" in layer._modules:
            momentum = layer.momentum
            _exchange(("averaging",), layer._modules, present._modules, self._modules)
            # It is a setting of the layer, not of the set: someone may have set it meanwhile.
            if layer.momentum != momentum:
                layer.momentum = momentum

    def check(self) -> None:
        """Move to the layer's device, and raise where the layer's tensors can't be exchanged for these.

        Raises:
            RuntimeError: as the layer has another number of channels by now, or a weight that is not a parameter of it.
        """
        own = self._buffers["running_mean"]
        if own is None:
            return
        mean = running_mean(self.__dict__["_layer"])  # waits for what other ranks have yet to send
        if mean.shape != own.shape:
            raise RuntimeError(
                f"A layer has {len(mean)} channels by now, and another set of its statistics {len(own)}. Change the "
                "channels before StatisticsSets(model, names)."
            )
        if own.device != mean.device:
            with out_of_inference_mode():
                self.to(mean.device)
        if not self._affine:
            return
        for name in _AFFINE:
            weight = self.layer._parameters.get(name)
            if (weight is None) != (self._parameters[name] is None) or (weight is not None and is_wrapper(weight)):
                raise RuntimeError(
                    "StatisticsSets(affine=True) can't exchange a weight that is sharded (fully_shard, tensor "
                    "parallelism), pruned or parametrized. Use affine=False, or leave such layers out: "
                    "StatisticsSets(model, names, layers=...)."
                )

    def average_as_layer(self) -> None:
        """Take an averaging like the one that the layer has been given meanwhile, without a history."""
        averaging = self.layer._modules.get("averaging")
        if self.is_in_place or _kind(averaging) == _kind(self._modules.get("averaging")):
            return
        for name, like in zip(_STATISTICS, running_statistics(self.layer), strict=True):
            buffer = self._buffers[name]
            self._buffers[name] = None if buffer is None else buffer.to(like.dtype)
        mean = self._buffers["running_mean"]
        if isinstance(averaging, Averaging) and mean is not None:
            self._take_averaging(averaging.for_layer(mean))
        else:
            self._take_averaging(None)

    def _take_averaging(self, averaging: nn.Module | None) -> None:
        self._modules.pop("averaging", None)
        if averaging is not None:
            self._modules["averaging"] = averaging

    @contextmanager
    def _held_here(self) -> Iterator[None]:
        """Register the tensors that are in the layer here too, for as long as they are saved or loaded."""
        layer, in_place = self.layer, self.is_in_place
        pairs = [(_BUFFERS, layer._buffers, self._buffers)]
        pairs += [(_AFFINE, layer._parameters, self._parameters)] if self._affine else []  # type: ignore[list-item]
        if not in_place:
            yield
            return
        try:
            for names, held, own in pairs:
                own.update({name: held[name] for name in names})
            self._modules["averaging"] = layer._modules.get("averaging")
            yield
        finally:
            for names, held, own in pairs:  # where they were assigned, they are other tensors now
                for name in names:
                    if own[name] is not None:
                        held[name] = own[name]
                    own[name] = None
            self._modules.pop("averaging", None)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        in_place = self.is_in_place
        with self._held_here():
            super()._save_to_state_dict(destination, prefix, keep_vars)
            averaging = self._modules.get("averaging")
            if in_place and averaging is not None:
                averaging.state_dict(destination=destination, prefix=f"{prefix}averaging.", keep_vars=keep_vars)
        if in_place and not keep_vars:
            # The model has these very tensors under its own keys, and safetensors takes no tensor twice.
            names = [prefix + name for name in (*_BUFFERS, *_AFFINE) if prefix + name in destination]
            destination.update({name: destination[name].clone() for name in names})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        *problems: list[str],
    ) -> None:
        in_place = self.is_in_place
        with self._held_here():
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *problems)
            averaging = self._modules.get("averaging")
            if in_place and averaging is not None:
                inner = f"{prefix}averaging."
                state = {key: value for key, value in state_dict.items() if key.startswith(inner)}
                averaging._load_from_state_dict(state, inner, local_metadata, strict, *problems)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SetPart:
        wide = {name: self._buffers[name] for name in _STATISTICS} if self._modules.get("averaging") else {}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in wide.items():
            if buffer is not None:  # what a layer with an averaging does too
                self._buffers[name] = apply_to_statistics(fn, buffer)
        return self


def _exchange(names: Iterable[str], held: dict[str, Any], theirs: dict[str, Any], own: dict[str, Any]) -> None:
    for name in names:
        theirs[name], held[name], own[name] = held[name], own[name], None


def _kind(averaging: nn.Module | None) -> tuple[Any, ...] | None:
    """What makes two averagings one rule; the momentum is the layer's."""
    if not isinstance(averaging, Averaging):
        return None
    return type(averaging), {name: value for name, value in averaging.settings().items() if name != "momentum"}
