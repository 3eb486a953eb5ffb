"""The one place that finds the batch-norm layers of a model and says what each of them is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["BatchNormLayer", "find_batch_norms", "parts_called_by", "user_name"]

# What torch names the module inside of one that it puts around it.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class BatchNormLayer:
    """A batch-norm layer of a model: torch's, this package's, synchronised, or anybody's subclass."""

    names: tuple[str, ...]
    """Every path that leads to it from the model, in registration order; more than one where the module is registered
    twice."""
    module: _BatchNorm

    @property
    def name(self) -> str:
        """The first path; the empty string where the model itself is the layer."""
        return self.names[0]

    @property
    def kind(self) -> str:
        """The name of its class."""
        return type(self.module).__name__

    @property
    def tracks(self) -> bool:
        """Whether training forwards move its running statistics."""
        return self.module.track_running_stats and self.module.running_mean is not None

    @property
    def frozen(self) -> bool:
        """Whether it has affine parameters and none of them learns; a layer without any is as free as the layers around
        it."""
        parameters = [p for p in (self.module.weight, self.module.bias) if p is not None]
        return bool(parameters) and not any(p.requires_grad for p in parameters)

    @property
    def synced(self) -> bool:
        """Whether it normalises with the batches of all ranks by torch's SyncBatchNorm."""
        return isinstance(self.module, nn.SyncBatchNorm)

    @property
    def shared(self) -> bool:
        """Whether the model holds it under more than one name. A layer that is merely called twice can't be told from
        outside."""
        return len(self.names) > 1


def find_batch_norms(model: nn.Module) -> list[BatchNormLayer]:
    """Return the batch-norm layers of `model`, each once, in registration order, named as a user wrote them.

    Example:
        >>> from torch import nn
        >>> shared = nn.BatchNorm1d(4)
        >>> model = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared)
        >>> [(layer.names, layer.kind) for layer in find_batch_norms(model)]
        [(('1', '3'), 'BatchNorm1d')]
    """
    found: dict[_BatchNorm, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm):
            found.setdefault(module, []).append(user_name(path))
    return [BatchNormLayer(tuple(names), module) for module, names in found.items()]


def user_name(path: str) -> str:
    """Return the path of a module as the user wrote it: without the modules of their own that torch.compile, FSDP 1 and
    activation checkpointing put around one.

    Example:
        >>> user_name("model._orig_mod.norm._fsdp_wrapped_module")
        'model.norm'
    """
    return ".".join(part for part in path.split(".") if part not in _WRAPPED)


def parts_called_by(step: nn.Module) -> list[nn.Module]:
    """Return what a module calls that has a training step and a model, or several, as its parts: its children, also
    those in containers."""
    parts: list[nn.Module] = []
    for child in step.children():
        parts += parts_called_by(child) if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
    return parts
