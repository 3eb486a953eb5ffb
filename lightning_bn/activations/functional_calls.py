"""Activation functions that are not modules, ``F.relu(x)`` or ``x.relu()``, and residual sums."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_bn.error_boundary import UNBOUNDED, ErrorBoundary, guarded
from lightning_bn.torch_internals import innermost_mode

_BOUNDS: dict[str, tuple[float, float]] = {
    "sigmoid": (0.0, 1.0),
    "hardsigmoid": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
}
# By the name that all forms of a function share, in place or not, of `torch`, `F` or a tensor.
_FUNCTIONS = {
    *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish"),
    *("softplus", "softsign", "hardtanh", "hardswish"),
    *_BOUNDS,
}
SUM = "add"
_SEEN = {*_FUNCTIONS, SUM}


class FunctionalCalls(TorchFunctionMode):
    """Sees the functions that a forward calls, while it is entered.

    Args:
        see: takes the name of a function and what it returned.
        boundary: stands around it.
    """

    def __init__(self, see: Callable[[str, Tensor], None], boundary: ErrorBoundary = UNBOUNDED) -> None:
        super().__init__()
        self._see, self._boundary = see, boundary
        self.is_paused = False

    def pause(self) -> None:
        """See nothing until `resume`, where no other mode was entered after this one: a call that a mode passes on
        takes torch many times as long as one that none sees."""
        if innermost_mode() is self:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self.is_paused = True

    def resume(self) -> None:
        """See what is called from here on."""
        if self.is_paused:
            self.is_paused = False
            super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        if self.is_paused:
            self.is_paused = False
        else:
            super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # A forward has thousands of other calls, attributes of tensors among them.
        if (name := _name_of(func)) in _SEEN:
            self._note(name, args, result)
        return result

    @guarded
    def _note(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        # torch turns the mode off while this runs: what is read of the result is not seen in turn.
        if isinstance(result, Tensor) and (name != SUM or _is_residual(args)):
            self._see(name, result)


@lru_cache(maxsize=1024)
def _name_of(func: Any) -> str:
    """The name that all forms of a function share."""
    return str(getattr(func, "__name__", "")).rstrip("_")


def function_of(name: str) -> str | None:
    """Return which function a row is of, None for a module's.

    Example:
        >>> function_of("layer1.0:relu[2]"), function_of("layer1.0.relu")
        ('relu', None)
    """
    _, colon, call = name.rpartition(":")
    return call.partition("[")[0] if colon and call.endswith("]") else None


def is_activation_function(function: str) -> bool:
    """Whether it is one, and not a sum."""
    return function in _FUNCTIONS


def functional_bounds(function: str) -> tuple[float, float] | None:
    """Return the least and the greatest value that a function can give, None where it has no such bounds."""
    return _BOUNDS.get(function)


def _is_residual(args: tuple[Any, ...]) -> bool:
    """Whether two activations are added: tensors of one shape, with several samples and channels."""
    tensors = [each for each in args[:2] if isinstance(each, Tensor) and each.is_floating_point()]
    return len(tensors) == 2 and tensors[0].dim() > 1 and tensors[0].shape == tensors[1].shape
