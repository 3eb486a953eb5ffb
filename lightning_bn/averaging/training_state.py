"""Tensors that belong to a module's training, not to the model: saved and moved with it, yet neither parameter nor
buffer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

STATE_OF = "state_of"
"""The key of a ``state_dict`` under which the text stands that says what the state means, as bytes: a checkpoint holds
tensors alone."""


class TrainingState(nn.Module):
    """A module whose declared tensors are private training state.

    A registered buffer is cast by ``.half()``, averaged by weight-averaging callbacks, broadcast by DDP at every
    forward and demanded by a strict load. State that only training reads must be spared all four, and yet survive
    ``state_dict`` -> ``load_state_dict``, ``.to(device)``, ``to_empty``, ``deepcopy`` and pickle. So the tensors are
    plain attributes, and this class overrides the three methods with which `torch.nn.Module` moves, saves and loads
    what a module owns; torch's own batch norm and RNNs override them too.

    The state of several modules may lie side by side in one tensor, of which each module's attribute is a view: whoever
    arranges that sets `tie`, and any assignment to an attribute, be it a moved tensor or another setting, unties the
    module again.
    """

    _state_names: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self._untie()

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "training":  # what .train() and .eval() assign
            self._untie()
        super().__setattr__(name, value)

    def _untie(self) -> None:
        # Not by __dict__, into which torch.compile before 2.12 can't write. torch allows for no None in its types.
        super().__setattr__("tie", None)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        # A view is saved with the whole of what it is a view of, so one layer's copy would carry the state of all.
        return (
            self.__dict__
            | {name: getattr(self, name).detach().clone() for name in self._state_names}
            | {"tie": None, "_of": None, "_others": None}
        )

    @property
    def state_meaning(self) -> str:
        """What the state means, in a few words; a checkpoint whose state means something else is refused."""
        return type(self).__name__

    @property
    def state_of(self) -> Tensor:
        """`state_meaning` as bytes, (length,) uint8; distributed checkpoints look each key of a ``state_dict`` up as an
        attribute."""
        return torch.frombuffer(bytearray(self.state_meaning.encode()), dtype=torch.uint8)

    def _declare(self, state: Mapping[str, Tensor]) -> None:
        """Take `state` as the private state; a tensor declared before under the same name and shape is written in
        place."""
        for name, value in state.items():
            present = getattr(self, name, None)
            if isinstance(present, Tensor) and _alike(present, value):
                present.copy_(value)
            else:
                setattr(self, name, value)
        self._state_names = tuple(state)

    def state(self) -> dict[str, Tensor]:
        """Return the private tensors by name."""
        return {name: getattr(self, name) for name in self._state_names}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainingState:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in self._state_names:
            setattr(self, name, apply_without_narrowing(fn, getattr(self, name)))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._state_names:
            # A copy: exponential moving averages of a whole state_dict (timm's ModelEma) write into the tensors they
            # find there.
            destination[prefix + name] = getattr(self, name).clone()
        if self._state_names:
            destination[prefix + STATE_OF] = self.state_of

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
        public = {key: value for key, value in state_dict.items() if key not in keys and key != prefix + STATE_OF}
        super()._load_from_state_dict(public, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        text = state_dict.get(prefix + STATE_OF)
        meaning = None if text is None else bytes(text.tolist()).decode()
        if meaning is not None and meaning != self.state_meaning:
            # torch raises for unexpected keys where it is strict, and returns them where it is not; that is all it
            # tells a module.
            why = f" (it holds the state of {meaning}, and this layer averages by {self}. {_MEND.format(prefix)})"
            unexpected_keys.append(prefix + STATE_OF + why)
            self.clear()
        elif not saved:
            # The checkpoint of a plain layer: no history came with it, so none is missing.
            self.clear()
        else:
            missing_keys.extend(key for key, name in keys.items() if name not in saved and strict)
            self._load(saved, prefix, error_msgs, assign=local_metadata.get("assign_to_params_buffers", False))
        self.__dict__["_of"] = None
        self._untie()  # so that the next forward tells whose history it is

    def _load(self, saved: dict[str, Tensor], prefix: str, error_msgs: list[str], *, assign: bool) -> None:
        for name, value in saved.items():
            present: Tensor = getattr(self, name)
            if present.shape != value.shape:
                error_msgs.append(
                    f"size mismatch for {prefix}{name}: the checkpoint has {tuple(value.shape)}, this {self} has "
                    f"{tuple(present.shape)}. {_MEND.format(prefix)}"
                )
            elif assign or present.is_meta:
                setattr(self, name, value.detach().clone())
            else:
                present.copy_(value)

    def clear(self) -> None:
        """Forget everything, in place: the state is what it was before the first training batch."""
        with torch.no_grad():
            for name in self._state_names:
                getattr(self, name).zero_()


_MEND = (
    "Build the layer with the averaging that the checkpoint was trained with. To start with an empty history, drop the "
    "keys that start with '{}'."
)


def apply_without_narrowing(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Return ``fn(tensor)``, or where that is a cast to fewer bits, `tensor` with its accuracy on the device where `fn`
    would have it."""
    moved = fn(tensor)
    return moved if torch.promote_types(moved.dtype, tensor.dtype) == moved.dtype else tensor.to(moved.device)


def apply_to_statistics(fn: Callable[[Tensor], Tensor], statistics: Tensor) -> Tensor:
    """Return ``fn(statistics)``, or where that is a cast to 16 bits, the statistics in float32: an average kept in
    bfloat16 stalls."""
    moved = fn(statistics)
    return statistics.to(moved.device, torch.float32) if moved.dtype.itemsize < 4 else moved


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
