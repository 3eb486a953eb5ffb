"""Choosing modules of a model by name, pattern, class or function, in the same way for every argument."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.discovery import user_name
from lightning_bn.error_boundary import theirs

Choice: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A name or a pattern of names, a class, or a function of name and module."""

Choices: TypeAlias = Choice | Iterable[Choice]
"""One `Choice` or several."""


def check_choices(call: str, choices: Choices) -> None:
    """Raise a TypeError that shows `call` unless `choices` are one `Choice` or several."""
    for choice in as_list(choices):
        if not isinstance(choice, str) and not callable(choice):
            raise TypeError(
                f'{call}: {choice!r} is not a name or a pattern ("layer4.*"), a class (nn.Conv2d), or a function of '
                "name and module. Give one of them, or a list."
            )


def is_chosen(choices: Choices, name: str, module: nn.Module) -> bool:
    """Tell whether one of `choices` means `module`, which the model has under `name`.

    A pattern, as ``"layer4.*"``, stands for the modules without modules of their own that it matches; a batch norm is
    one of these, also with an averaging.

    Example:
        >>> is_chosen(["head", "layer4.*"], "layer4.0.bn1", nn.BatchNorm2d(4)), is_chosen(nn.ReLU, "act", nn.Tanh())
        (True, False)
    """
    return any(_means(choice, name, module) for choice in as_list(choices))


def as_patterns(model: nn.Module, choices: Choices) -> tuple[str, ...]:
    """Return the same choices as names and patterns alone: a class or a function becomes the names of what it means."""
    patterns: list[str] = []
    for choice in as_list(choices):
        if isinstance(choice, str):
            patterns.append(choice)
        else:
            named = ((user_name(path), module) for path, module in model.named_modules())
            patterns += [name for name, module in named if is_chosen(choice, name, module)]
    return tuple(patterns)


def as_list(choices: Choices) -> list[Choice]:
    """Return one choice or several as a list."""
    if isinstance(choices, Iterable) and not isinstance(choices, (str, type)):
        return list(choices)
    return [choices]


def _means(choice: Choice, name: str, module: nn.Module) -> bool:
    if isinstance(choice, str):
        leaf = isinstance(module, _BatchNorm) or not any(True for _ in module.children())
        return choice == name or (leaf and fnmatchcase(name, choice))
    if isinstance(choice, type):
        return isinstance(module, choice)
    with theirs():
        return bool(choice(name, module))
