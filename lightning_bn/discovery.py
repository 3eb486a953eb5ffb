"""The one place that finds the batch-norm layers of a model and says what each of them is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_bn.torch_internals import buffers_of, modules_by_path

# What torch names the module inside of one that it puts around it.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


# Buffers that hold running statistics, by the ends of their names; norms that are no batch norms keep them too.
_STATISTICS = ("running_mean", "running_var", "running_std")


@dataclass(frozen=True)
class BatchNormLayer:
    """A batch-norm layer of a model: torch's, this package's, synchronised, or anybody's subclass. Its running
    statistics are one value a channel."""

    names: tuple[str, ...]
    """Every path that leads to it from the model, in registration order; more than one where the module is registered
    twice."""
    module: _BatchNorm
    around: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)
    """The modules that the first path leads through, innermost first, the model last."""

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
        """Whether no parameter of it requires grad; a layer without any is as free as the module around it."""
        return self.is_frozen(lambda parameter: parameter.requires_grad)

    def is_frozen(self, learns: Callable[[nn.Parameter], bool]) -> bool:
        """`frozen`, where `learns` says which parameters do: those that an optimizer holds, for instance."""
        own = [
            parameter
            for name, parameter in self.module.named_parameters()
            if "." not in name or name.startswith("parametrizations.")  # not those of an activation in it
        ]
        for parameters in (own, *(module.parameters() for module in self.around)):
            parameters = list(parameters)
            if parameters:
                return not any(map(learns, parameters))
        return False

    @property
    def synced(self) -> bool:
        """Whether it normalises with the batches of all ranks by torch's SyncBatchNorm."""
        return isinstance(self.module, nn.SyncBatchNorm)

    @property
    def shared(self) -> bool:
        """Whether the model holds it under more than one name. A layer that is merely called twice can't be told from
        outside."""
        return len(self.names) > 1


def has_known_forward(layer: _BatchNorm) -> bool:
    """Tell whether the layer's forward is torch's or this package's, which normalise their input as it comes, count
    each batch in ``num_batches_tracked`` and hand buffers and momentum to the kernel. What another forward does, only a
    trial (`why_unsupported`) or the values of its buffers tell."""
    ours = type(layer).__module__ == "lightning_bn"
    return "forward" not in vars(layer) and (ours or type(layer).forward in _KNOWN_FORWARDS)


_KNOWN_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)  # 1d and 3d inherit the former


@dataclass(frozen=True)
class UnservedNorm:
    """A module that holds running statistics which this package can neither average, recalibrate nor judge."""

    name: str
    module: nn.Module
    reason: str
    """Why, as the end of a sentence: "it is no subclass of torch's batch norm"."""
    is_constant: bool
    """Whether its statistics never move: a frozen norm keeps weight and bias as buffers too."""

    @property
    def kind(self) -> str:
        """The name of its class."""
        return str(getattr(self.module, "original_name", type(self.module).__name__))  # a ScriptModule's own

    def __str__(self) -> str:
        return f"{self.name or 'the module itself'} ({self.kind}): {self.reason}"


def find_batch_norms(model: nn.Module) -> list[BatchNormLayer]:
    """Return the batch-norm layers of `model`, each once, in registration order, named as a user wrote them.

    They are what the package serves; `find_unserved` returns all else that holds running statistics.

    Example:
        >>> from torch import nn
        >>> shared = nn.BatchNorm1d(4)
        >>> model = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared)
        >>> [(layer.names, layer.kind) for layer in find_batch_norms(model)]
        [(('1', '3'), 'BatchNorm1d')]
    """
    modules = modules_by_path(model)
    paths: dict[_BatchNorm, list[str]] = {}
    for path, module in modules.items():
        if isinstance(module, _BatchNorm) and _why_not_per_channel(module) is None:
            paths.setdefault(module, []).append(path)
    return [
        BatchNormLayer(tuple(map(user_name, found)), module, tuple(modules[path] for path in ancestors(found[0])))
        for module, found in paths.items()
    ]


Modes = tuple[bool, ...]
"""The ``training`` flags of `NamedModules.modules`, in their order."""


class NamedModules:
    """The modules of `model` by the names that a user gave them, and its batch-norm layers, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        named = [(user_name(name), module) for name, module in model.named_modules()]
        self.names = [name for name, _ in named]
        self.modules: list[nn.Module] = [module for _, module in named]
        self.layers: list[BatchNormLayer] = find_batch_norms(model)

    def module(self, name: str) -> nn.Module:
        """Return the module of that name."""
        return self.modules[self.names.index(name)]

    def snapshot(self) -> Modes:
        """Return the ``training`` flag of every module."""
        return tuple([module.training for module in self.modules])

    def restore(self, modes: Modes) -> None:
        """Give every module its flag of `modes` back."""
        for module, training in zip(self.modules, modes, strict=True):
            module.training = training

    def differing(self, before: Modes, after: Modes) -> list[str]:
        """Return the names of the topmost modules whose flags differ; what is below one that changed alike goes
        unnamed."""
        changed = {name: one for name, was, one in zip(self.names, before, after, strict=True) if was != one}
        return [name for name, now in changed.items() if all(changed.get(parent) != now for parent in ancestors(name))]


def find_unserved(model: nn.Module) -> list[UnservedNorm]:
    """Return the modules of `model` that hold running statistics and are not among `find_batch_norms`.

    Example:
        >>> class ByType(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("running_mean", torch.zeros(2, 8))
        >>> [str(norm) for norm in find_unserved(nn.Sequential(nn.BatchNorm1d(8), ByType()))]
        ["1 (ByType): it is no subclass of torch's batch norm"]
    """
    found, seen = [], set()
    for path, module in modules_by_path(model).items():
        reason = None if module in seen else _why_unserved(module)
        seen.add(module)
        if reason is not None:
            held = dict(module.named_buffers(recurse=False))
            is_constant = not isinstance(module, _BatchNorm) and {"weight", "bias"} <= held.keys()
            found.append(UnservedNorm(user_name(path), module, reason, is_constant))
    return found


def unserved(model: nn.Module, *, constant: bool = False) -> str:
    """Return `find_unserved` as a sentence that follows another; empty if there are none.

    Args:
        model: whose norms are meant.
        constant: whether to name those too whose statistics never move, as where it is said that there is no other.
    """
    found = [str(norm) for norm in find_unserved(model) if constant or not norm.is_constant]
    more = f"; and {len(found) - 3} more" * (len(found) > 3)
    return f" Not supported: {'; '.join(found[:3])}{more}." if found else ""


def _why_unserved(module: nn.Module) -> str | None:
    if isinstance(module, _BatchNorm):
        return _why_not_per_channel(module)
    names = [name for name, buffer in buffers_of(module).items() if buffer is not None]
    if not any(name.endswith(_STATISTICS) for name in names) or isinstance(module, _InstanceNorm):
        return None
    if getattr(type(module), "keeps_for_another", False):  # another set of a layer's
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript, in which hooks are not called"
    return "it is no subclass of torch's batch norm"


def _why_not_per_channel(layer: _BatchNorm) -> str | None:
    mean, var, weight = layer.running_mean, layer.running_var, getattr(layer, "weight", None)
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return None
    if mean is None or var is None:
        return None if mean is var else f"it keeps a running_{'var' if mean is None else 'mean'} alone"
    # Who removes channels may leave num_features as it was.
    channels = {layer.num_features, *([weight.numel()] if isinstance(weight, Tensor) else [])}
    if mean.dim() == 1 and len(mean) in channels:
        return None
    return f"its running_mean of shape {tuple(mean.shape)} is not one value for each of {layer.num_features} channels"


def ancestors(name: str) -> Iterator[str]:
    """Yield the names of the modules above `name`, nearest first, the model itself, which has the empty name, last.

    Example:
        >>> list(ancestors("backbone.layer1.bn"))
        ['backbone.layer1', 'backbone', '']
    """
    while name:
        name = name.rpartition(".")[0]
        yield name


def listing(names: Sequence[str], shown: int = 3) -> str:
    """Return `names` in words, the first few of many."""
    words = [name or "the module itself" for name in names[:shown]]
    return ", ".join(words) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def is_inside(name: str, top: str) -> bool:
    """Tell whether the module `name` is `top` or below it."""
    return not top or name == top or name.startswith(f"{top}.")


def unsaved_by_adapter(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Return those of `layers` that belong to the base model of an adapter of peft's, whose ``save_pretrained`` writes
    no statistics of it: all but those that its config names in ``modules_to_save``."""
    modules = modules_by_path(model)
    classes = {each for each in set(map(type, modules.values())) if each.__module__.partition(".")[0] == "peft"}
    peft = {name for name, module in modules.items() if type(module) in classes} if classes else set()
    adapted = {name for name in peft if hasattr(modules[name], "peft_config")}
    saved = {name for name in peft if hasattr(modules[name], "modules_to_save")} - adapted
    above = {layer: {layer, *ancestors(layer)} for layer in layers}
    return [layer for layer, names in above.items() if names & adapted and not names & saved]


def in_eval_mode(layers: Iterable[BatchNormLayer]) -> set[nn.Module]:
    """Return the layers that are in eval mode. In training these are the ones that the user put there; ask before a
    validation begins, when all are."""
    return {layer.module for layer in layers if not layer.module.training}


def learning(layers: Iterable[BatchNormLayer], in_eval: Collection[nn.Module]) -> list[BatchNormLayer]:
    """Return the layers whose running statistics training moves: those that keep some, are not frozen, and are not
    `in_eval` mode in training."""
    return [layer for layer in layers if layer.tracks and not layer.frozen and layer.module not in in_eval]


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
    those in containers. TorchScript is left out, which takes no hooks."""
    parts: list[nn.Module] = []
    for child in step.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            parts += parts_called_by(child)
        elif not isinstance(child, torch.jit.ScriptModule):
            parts.append(child)
    return parts
