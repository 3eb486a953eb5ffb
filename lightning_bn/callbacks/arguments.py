"""How a callback shows itself: by the call that makes it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator


class ShowsArguments:
    """A class whose objects keep each argument under its name, and whose repr is the call without what is default.

    Example:
        >>> class Check(ShowsArguments):
        ...     def __init__(self, layers=None, *, action="warn", ignore=()):
        ...         self.layers, self.action, self.ignore = layers, action, tuple(ignore)
        >>> Check(["bn1"], action="raise")
        Check(layers=['bn1'], action='raise')
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._arguments())})"

    def _arguments(self) -> Iterator[str]:
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if name == "self" or not hasattr(self, name):
                continue
            value = getattr(self, name)
            # Identity first: what an argument's own == returns need not be a bool.
            if value is not parameter.default and repr(value) != repr(parameter.default):
                yield f"{name}={value!r}"


def stable_text(choices: object) -> str:
    """Return choices as text that is the same in another process, where a function lies at another address."""
    each = choices if isinstance(choices, (list, tuple)) else [choices]
    return ", ".join(getattr(one, "__qualname__", None) or str(one) for one in each)
