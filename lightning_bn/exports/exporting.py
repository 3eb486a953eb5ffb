"""A model as it is to be exported, and as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_bn.averaging.base import TrainingState
from lightning_bn.torchscript import watchers_hooks

_FLAGS = ("training", "track_running_stats", "momentum")


@contextmanager
def exporting(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, and give back every flag and statistic, whatever an exporter does to it inside.

    Exporters write the mode that a model is in, and some put it into another one: afterwards frozen parts are in
    training mode, or the whole model is in eval mode, and a forward in between moved the running statistics.

    Args:
        model: any module. At exit each submodule has its own mode back, each buffer the same tensor with the same
            values, each parameter its ``requires_grad``, and each averaging its history; also after an exception.
            Inside, the hooks of this package's callbacks are off: ``torch.jit.script`` takes no module with hooks.

    Example:
        >>> import torch
        >>> from lightning_bn import exporting
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).train()
        >>> with exporting(model):
        ...     traced = torch.jit.trace(model, torch.randn(8, 3))
        >>> model.training, model[1].num_batches_tracked.item()
        (True, 0)
    """
    modules = list(model.modules())
    flags = [(each, {name: each.__dict__[name] for name in _FLAGS if name in each.__dict__}) for each in modules]
    learning = [(each, each.requires_grad) for each in model.parameters()]
    buffers = [(each, dict(each._buffers)) for each in modules]
    held = [value for _, own in buffers for value in own.values() if value is not None]
    held += [value for each in modules if isinstance(each, TrainingState) for value in each.state().values()]
    values = [value.detach().clone() for value in held]
    hooks = [(own, dict(own)) for each in modules for own in _hooks_of(each)]
    try:
        for members, key in [found for each in modules for found in watchers_hooks(each)]:
            del members[key]
        model.eval()
        yield
    finally:
        for members, before in hooks:
            added = {key: hook for key, hook in members.items() if key not in before}
            members.clear()
            members.update(before | added)
        for module, own_flags in flags:
            for name, flag in own_flags.items():
                setattr(module, name, flag)
        for parameter, learns in learning:
            parameter.requires_grad_(learns)
        for module, own in buffers:
            for name, buffer in own.items():
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
        with torch.no_grad():
            for tensor, value in zip(held, values, strict=True):
                tensor.copy_(value)


def _hooks_of(module: nn.Module) -> tuple[dict[int, Callable[..., Any]], ...]:
    return module._forward_pre_hooks, module._forward_hooks
