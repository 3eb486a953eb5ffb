"""Lines of code that mend a model: made from module names, so that they run as printed."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Collection, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.discovery import NamedModules, ancestors
from lightning_bn.rules.finding import Fix

MANY, FEW_HOLDERS = 6, 3
"""Layers that a line of code still names one by one; modules that hold them, which it names instead."""

RECALIBRATION = Fix('callbacks=[..., BatchNormRecalibration(when="validation")]', "in the Trainer")


def modules_of(layers: Collection[str], among: Collection[str]) -> list[str]:
    """Return the topmost modules that hold nothing of `among` but `layers`, and together hold all of these.

    Example:
        >>> modules_of(["a.0", "a.1", "b.0"], among=["a.0", "a.1", "b.0", "b.1"])
        ['a', 'b.0']
    """
    wanted = set(layers)
    others = {above for name in among if name not in wanted for above in (name, *ancestors(name))}
    tops = []
    for name in layers:
        top = name
        for above in ancestors(name):
            if above in others or not above:
                break
            top = above
        tops.append(top)
    return list(dict.fromkeys(tops))


def frozen_regions(
    layers: Collection[str], model: NamedModules, learning: Callable[[nn.Parameter], bool] | None = None
) -> list[str]:
    """Return the topmost modules that hold all of `layers`, no other batch norm, and no parameter that learns (or that
    requires grad).

    In eval mode such a region is frozen whole, and nothing that learns has its dropout switched off.
    """
    learning = learning or (lambda parameter: parameter.requires_grad)
    modules = zip(model.names, model.modules, strict=True)
    own = {name for name, module in modules if any(map(learning, module.parameters(recurse=False)))}
    return modules_of(layers, {layer.name for layer in model.layers} | own - set(layers))


def expression(root: str, name: str, model: nn.Module) -> str:
    """Return the expression that leads to the module `name` from `root`, which is how the code calls `model`.

    Example:
        >>> model = nn.ModuleDict({"my-head": nn.Sequential(nn.BatchNorm1d(2))})
        >>> expression("self", "my-head.0", model)
        "self['my-head'][0]"
    """
    for part in name.split(".") if name else ():
        holder = _holder(model, part)
        model = getattr(holder, part)
        # In the body of a class Python gives an attribute that begins with two underscores another name.
        is_attribute = part.isidentifier() and not keyword.iskeyword(part) and not part.startswith("__")
        if isinstance(holder, nn.ModuleDict) and not is_attribute:
            root += f"[{part!r}]"
        elif isinstance(holder, (nn.Sequential, nn.ModuleList)) and part.isdecimal() and _at(holder, part) is model:
            root += f"[{part}]"
        elif is_attribute:
            root += f".{part}"
        else:
            root += f".get_submodule({part!r})"
    return root


def _holder(module: nn.Module, part: str) -> nn.Module:
    """Return the module whose child is called `part`: it may be inside of others whose names a user never wrote."""
    children = dict(module.named_children())
    return module if part in children or hasattr(module, part) else _holder(next(iter(children.values())), part)


def _at(holder: nn.Sequential | nn.ModuleList, part: str) -> nn.Module | None:
    return holder[int(part)] if int(part) < len(holder) else None


def call(root: str, names: Sequence[str], method: str, model: nn.Module) -> str:
    """Return a line of code that calls `method` of every module in `names`, found as by `expression`.

    Example:
        >>> model = nn.ModuleDict({"a": nn.BatchNorm1d(2), "b": nn.BatchNorm1d(2)})
        >>> call("self", ["a"], "eval", model)
        'self.a.eval()'
        >>> call("self", ["a", "b"], "eval", model)
        'for module in (self.a, self.b): module.eval()'
    """
    if len(names) == 1:
        return f"{expression(root, names[0], model)}.{method}()"
    return f"for module in {each_of(root, names, model)}: module.{method}()"


def each_of(root: str, names: Sequence[str], model: nn.Module) -> str:
    """Return an expression of several modules: a tuple, and of many batch norms a list of all in the modules that hold
    them.

    Example:
        >>> model = nn.ModuleDict({"a": nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(9))), "b": nn.BatchNorm1d(2)})
        >>> each_of("model", [f"a.{index}" for index in range(9)], model)
        '[each for each in model.a.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]'
    """
    norms = {name: each for name, each in model.named_modules() if isinstance(each, _BatchNorm)}
    if len(names) > MANY and set(names) <= set(norms):
        holders = [""] if set(names) == set(norms) else modules_of(names, norms)
        if len(holders) <= FEW_HOLDERS:
            parts = [f"{expression(root, holder, model)}.modules()" for holder in holders]
            every = parts[0] if len(parts) == 1 else f"({', '.join(f'*{part}' for part in parts)})"
            return f"[each for each in {every} if isinstance(each, nn.modules.batchnorm._BatchNorm)]"
    return f"({', '.join(expression(root, name, model) for name in names)})"


def allowed(names: Sequence[str], shown: int = 6) -> str:
    """Return the argument ``allow_eval`` that covers all of `names`; of many, by patterns of their last parts.

    Example:
        >>> allowed(["backbone"])
        "allow_eval=['backbone']"
        >>> allowed([f"layer{i}.bn{j}" for i in range(5) for j in (1, 2)])
        "allow_eval=['*.bn1', '*.bn2']"
    """
    if len(names) > shown:
        names = [f"*.{name.rpartition('.')[2]}" if "." in name else name for name in names]
    return f"allow_eval={list(dict.fromkeys(names))}"


def group_norms(root: str, layers: Sequence[tuple[str, int]], model: nn.Module) -> str:
    """Return code that puts a group norm in the place of each layer, given by its name and its channels.

    The number of groups divides the channels, and is 32 or less; no group is of one channel, which would be an instance
    norm.

    Example:
        >>> group_norms("model", [("1", 48)], nn.Sequential(nn.ReLU(), nn.BatchNorm1d(48)))
        'model[1] = nn.GroupNorm(24, 48)'
    """
    parts = []
    for name, channels in layers:
        place, norm = expression(root, name, model), f"nn.GroupNorm({_groups(channels)}, {channels})"
        above, part = name.rpartition(".")[::2]
        held = f"setattr({expression(root, above, model)}, {part!r}, {norm})"
        parts.append(held if place.endswith(")") else f"{place} = {norm}")
    return "; ".join(parts)


def _groups(channels: int) -> int:
    return max((groups for groups in range(1, min(32, channels // 2) + 1) if channels % groups == 0), default=1)


def learns(module: nn.Module) -> bool:
    """Whether any parameter in the module requires grad."""
    return any(parameter.requires_grad for parameter in module.parameters())
