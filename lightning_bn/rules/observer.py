"""What the batch-norm layers of a model do, forward by forward, seen from outside; it knows neither rules nor a Trainer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_bn.discovery import BatchNormLayer, find_batch_norms, user_name
from lightning_bn.layers.settlement import is_deferred
from lightning_bn.torch_internals import in_backward

__all__ = ["Forward", "Modes", "Observer"]

Modes = tuple[bool, ...]
"""The ``training`` flags of `Observer.modules`, in their order."""


class Forward(NamedTuple):
    """One forward of one batch-norm layer. Nothing in it was read from a device."""

    layer: int
    """Index into `Observer.layers`."""
    training: bool
    moved: bool
    """Whether it wrote the running statistics: whether the version of ``num_batches_tracked`` rose, which lives on the host."""
    tracking: bool
    """The layer's ``track_running_stats`` at that time."""
    grad: bool
    recomputed: bool
    """Whether it ran inside a backward pass: the recomputation of activation checkpointing."""
    failed: bool
    call: int
    """Which outermost call of the model it was part of, counted since `Observer.begin`; negative where the layer was called by itself."""
    source: int
    """Which input that call had: calls that were given the same tensor have the same number."""
    reweighted: bool
    """Whether the layer's affine weight was written since its first forward of this batch."""
    samples: int
    values: int
    """Values per channel."""


class Observer:
    """Hooks on the batch-norm layers of `model`, and on the modules that a training step calls.

    Under `torch.compile` the hooks do nothing, and are traced to nothing: a layer that moves and was never seen is `unseen`.

    Args:
        model: its modules and layers are found now; hooks come with `attach`.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(user_name(name), module) for name, module in model.named_modules()]
        self.names = [name for name, _ in named]
        self.modules = [module for _, module in named]
        self.layers: list[BatchNormLayer] = find_batch_norms(model)
        self.seen: set[int] = set()
        self.trained: set[int] = set()
        """Indices of the layers that ran in a training batch."""
        self.forwards: list[Forward] = []
        self.entered_backward: set[int] = set()
        """The calls of this batch, of those that repeat an input at other weights, that gradients flowed through."""
        self.modes: Modes | None = None
        """The modes at the first forward of this batch."""
        self.depth = self.call = self.source = 0
        self._sources: list[weakref.ref[Tensor]] = []
        self._recording = False
        self._handles: list[RemovableHandle] = []
        self._taps: list[_Tap] = []

    def attach(self, entries: Iterable[nn.Module]) -> None:
        """Set the hooks.

        Args:
            entries: the modules whose calls count as calls of the model: the model itself, or what its training step calls.
        """
        self._taps = [_Tap(self, index, layer.module) for index, layer in enumerate(self.layers)]
        for module in dict.fromkeys(entries):
            if not isinstance(module, _BatchNorm):
                self._handles += [
                    module.register_forward_pre_hook(self._enter, with_kwargs=True),
                    module.register_forward_hook(self._leave, always_call=True),
                ]

    def close(self) -> None:
        """Remove every hook."""
        for handle in (*self._handles, *(handle for tap in self._taps for handle in tap.handles)):
            handle.remove()
        self._handles, self._taps = [], []
        self._recording = False

    def begin(self) -> None:
        """Begin a batch: what was recorded before is forgotten."""
        self.forwards = []
        self.entered_backward = set()
        self.modes = None
        self.depth = self.call = self.source = 0
        self._sources = []
        for tap in self._taps:
            tap.first_weights = None
        self._recording = True

    def end(self) -> None:
        """Record nothing until the next `begin`."""
        self._recording = False
        self._sources = []

    def snapshot(self) -> Modes:
        """Return the ``training`` flag of every module."""
        return tuple([module.training for module in self.modules])

    def restore(self, modes: Modes) -> None:
        """Give every module its flag of `modes` back."""
        for module, training in zip(self.modules, modes, strict=True):
            module.training = training

    def differing(self, before: Modes, after: Modes) -> list[str]:
        """Return the names of the topmost modules whose flags differ; what is below one that changed alike goes unnamed."""
        changed = {name: one for name, was, one in zip(self.names, before, after, strict=True) if was != one}
        return [name for name, now in changed.items() if all(changed.get(parent) != now for parent in ancestors(name))]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not self._recording:
            return
        self.depth += 1
        if self.depth == 1:
            self.open_call(next(_tensors((args, kwargs)), None))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and self._recording:
            self.depth = max(self.depth - 1, 0)

    def open_call(self, input: Tensor | None) -> None:
        self.call += 1
        for number, source in enumerate(self._sources):
            if input is not None and source() is input:
                self.source = number
                return
        self.source = len(self._sources)
        if input is not None:
            self._sources.append(weakref.ref(input))

    def before_layer(self, input: Tensor | None) -> bool:
        """Note that a layer is about to run; returns whether that is to be recorded."""
        if not self._recording:
            return False
        if self.modes is None:
            self.modes = self.snapshot()
        if self.depth == 0:
            self.open_call(input)
        return True


class _Tap:
    """The two hooks of one layer."""

    def __init__(self, observer: Observer, index: int, layer: _BatchNorm) -> None:
        self.first_weights: int | None = None
        self._observer = observer
        self._index = index
        self._before: int | None = None
        self._recording = False
        self.handles = [
            # First in, last out: the layer may have hooks that exchange its buffers for the length of a forward.
            layer.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            layer.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

    def _enter(self, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self._recording = self._observer.before_layer(_input(args, kwargs))
        self._before = _version(layer.num_batches_tracked)

    def _leave(self, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or not self._recording:
            return
        observer, input = self._observer, _input(args, kwargs)
        weights = _version(layer.weight) or 0
        repeated = self.first_weights is not None
        if not repeated:
            self.first_weights = weights
        forward = Forward(
            layer=self._index,
            training=layer.training,
            moved=output is not None and self._moved(layer),
            tracking=layer.track_running_stats and layer.running_mean is not None,
            grad=torch.is_grad_enabled(),
            recomputed=in_backward(),
            failed=output is None,
            call=observer.call if observer.depth else -observer.call,
            source=observer.source,
            reweighted=weights != self.first_weights,
            samples=0 if input is None else input.shape[0],
            values=0 if input is None else input.numel() // max(input.shape[1], 1),
        )
        observer.forwards.append(forward)
        observer.seen.add(self._index)
        if forward.reweighted and isinstance(output, Tensor) and output.requires_grad:
            entered, call = observer.entered_backward, forward.call
            output.register_hook(lambda _: entered.add(call))

    def _moved(self, layer: _BatchNorm) -> bool:
        after = _version(layer.num_batches_tracked)
        # Statistics that wait for the other ranks' are written later, and some tensors keep no version.
        if self._before is None or after is None or is_deferred(layer):
            return bool(layer.training and layer.track_running_stats and layer.running_mean is not None and not in_backward())
        return after != self._before


def parts_called_by(step: nn.Module) -> list[nn.Module]:
    """Return what a module calls that has a training step and a model, or several, as its parts: its children, also those in containers."""
    parts: list[nn.Module] = []
    for child in step.children():
        parts += parts_called_by(child) if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
    return parts


def ancestors(name: str) -> Iterator[str]:
    """Yield the names of the modules above `name`, nearest first, the model itself, which has the empty name, last.

    Example:
        >>> list(ancestors("backbone.layer1.bn"))
        ['backbone.layer1', 'backbone', '']
    """
    while name:
        name = name.rpartition(".")[0]
        yield name


def _version(tensor: Tensor | None) -> int | None:
    """How often the tensor was written; None where that is not kept: there is no tensor, or it was made in inference mode."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    value = args[0] if args else kwargs.get("input")
    return value if isinstance(value, Tensor) else None


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
