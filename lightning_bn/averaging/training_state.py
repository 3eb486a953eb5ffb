"""Tensors that belong to a module's training, not to the model: saved and moved with it, yet neither parameter nor buffer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TrainingState", "apply_without_narrowing"]


class TrainingState(nn.Module):
    """A module whose declared tensors are private training state.

    A registered buffer is cast by ``.half()``, averaged by weight-averaging callbacks, broadcast by DDP at every forward and demanded by
    a strict load. State that only training reads must be spared all four, and yet survive ``state_dict`` -> ``load_state_dict``,
    ``.to(device)``, ``to_empty``, ``deepcopy`` and pickle. So the tensors are plain attributes, and this class overrides the three
    methods with which `torch.nn.Module` moves, saves and loads what a module owns; torch's own batch norm and RNNs override them too.
    """

    _state_names: tuple[str, ...] = ()

    def _declare(self, state: Mapping[str, Tensor]) -> None:
        """Take `state` as the private state; a tensor declared before under the same name and shape is written in place."""
        for name, value in state.items():
            present = getattr(self, name, None)
            if isinstance(present, Tensor) and _alike(present, value):
                present.copy_(value)
            else:
                setattr(self, name, value)
        self._state_names = tuple(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainingState:
        super()._apply(fn, recurse)
        for name in self._state_names:
            setattr(self, name, apply_without_narrowing(fn, getattr(self, name)))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._state_names:
            # A copy: exponential moving averages of a whole state_dict (timm's ModelEma) write into the tensors they find there.
            destination[prefix + name] = getattr(self, name).detach().clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        keys = {prefix + name: name for name in self._state_names}
        saved = {name: state_dict[key] for key, name in keys.items() if key in state_dict}
        public = {key: value for key, value in state_dict.items() if key not in keys}
        super()._load_from_state_dict(public, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if not saved:
            # The checkpoint of a plain layer: no history came with it, so none is missing.
            self.clear()
            return
        missing_keys.extend(key for key, name in keys.items() if name not in saved and strict)
        for name, value in saved.items():
            present: Tensor = getattr(self, name)
            if present.shape != value.shape:
                error_msgs.append(
                    f"size mismatch for {prefix}{name}: the checkpoint has {tuple(value.shape)}, this {self} has "
                    f"{tuple(present.shape)}. Build the layer with the averaging the checkpoint was trained with, or drop the "
                    f"keys that start with '{prefix}' to start with an empty history."
                )
            else:
                present.copy_(value)

    def clear(self) -> None:
        """Forget everything, in place: the state is what it was before the first training batch."""
        with torch.no_grad():
            for name in self._state_names:
                getattr(self, name).zero_()


def apply_without_narrowing(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Return ``fn(tensor)``, or where that is a cast to fewer bits, `tensor` with its accuracy on the device where `fn` would have it."""
    moved = fn(tensor)
    return moved if torch.promote_types(moved.dtype, tensor.dtype) == moved.dtype else tensor.to(moved.device)


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
