"""What ``torch.jit.script`` finds of a model that is watched: the model without its watchers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_PREPARE = "__prepare_scriptable__"


def watchers_hooks(module: nn.Module) -> list[tuple[dict[int, Any], int]]:
    """Return where the forward hooks of this package's observers are on `module`. Those that a layer holds itself are
    part of what it computes."""
    held = [id(value) for value in vars(module).values()]
    return [
        (hooks, key)
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for key, hook in hooks.items()
        if str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("lightning_bn.")
        and id(getattr(hook, "__self__", hook)) not in held
    ]


class _Unwatched:
    """Returns `module`, of which this is ``__prepare_scriptable__``, without the hooks of observers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.users = 0

    def __call__(self) -> nn.Module:
        return self._twin(self.module, {})

    def _twin(self, module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
        if module in twins or isinstance(module, torch.jit.ScriptModule):
            return twins.get(module, module)
        twins[module] = twin = object.__new__(type(module))
        children = {name: child and self._twin(child, twins) for name, child in module._modules.items()}
        vars(twin).update({key: value for key, value in vars(module).items() if key != _PREPARE}, _modules=children)
        watchers = [(id(hooks), key) for hooks, key in watchers_hooks(module)]
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = vars(module)[name]
            vars(twin)[name] = type(hooks)((k, v) for k, v in hooks.items() if (id(hooks), k) not in watchers)
        return twin


def scriptable(model: nn.Module) -> Callable[[], None]:
    """Let ``torch.jit.script`` compile `model` and its parts without the hooks of this package's observers. Returns
    what ends that.

    It compiles a module's hooks too, and these are not TorchScript. Nothing public lets one out; in private it asks
    each module for what is to stand in its place. Where that is gone it raises, as with any other hook.
    """
    modules = [
        each
        for each in model.modules()
        if not isinstance(each, torch.jit.ScriptModule) and not hasattr(type(each), _PREPARE)
    ]
    for each in modules:
        vars(each).setdefault(_PREPARE, _Unwatched(each)).users += 1

    def end() -> None:
        while modules:
            own = vars(each := modules.pop()).get(_PREPARE)
            if isinstance(own, _Unwatched):
                own.users -= 1
                if own.users <= 0:
                    del vars(each)[_PREPARE]

    return end
