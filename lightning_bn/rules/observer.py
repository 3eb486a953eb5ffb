"""What the batch-norm layers of a model do, forward by forward, seen from outside; it knows neither rules nor a
Trainer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from operator import attrgetter, sub
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_bn.buffers import running_mean, running_var
from lightning_bn.discovery import Modes, NamedModules
from lightning_bn.error_boundary import UNBOUNDED, ErrorBoundary, guarded
from lightning_bn.layers.settlement import is_deferred
from lightning_bn.rules.batch_pattern import BatchOutline, BatchPattern, ForwardRecord
from lightning_bn.rules.snapshots import unsure, version, versions, writes
from lightning_bn.set_in_use import OtherSets
from lightning_bn.torch_internals import (
    buffers_of,
    divided,
    in_backward,
    is_compiled,
    is_exporting,
    is_tracing,
    parameters_of,
)
from lightning_bn.torchscript import scriptable

_flags = attrgetter("training", "track_running_stats")


class Observer(NamedModules):
    """Hooks on the batch-norm layers of `model`, and on the modules that a training step calls.

    Under `torch.compile` the hooks do nothing, and are traced to nothing: a layer that moves and was never seen is
    `unseen`. The layers have no hooks while training batches are alike: see `BatchPattern`.

    Args:
        model: its modules and layers are found now; hooks come with `attach`.
        boundary: stands around every hook.
    """

    def __init__(self, model: nn.Module, boundary: ErrorBoundary = UNBOUNDED) -> None:
        super().__init__(model)
        self.boundary = boundary
        self.seen: set[int] = set()
        self.forwards: list[ForwardRecord] = []
        """The forwards of this batch, in their order."""
        self.entered_backward: set[int] = set()
        """The calls of this batch, of those that repeat an input at other weights, that gradients flowed through."""
        self.modes: Modes | None = None
        """The modes at the first forward of this batch, unless they were set when it began."""
        self.recording = False
        self.exported = False
        """Whether an exporter has run a part of the model since somebody reset this."""
        self.call = self.source = 0
        self.at = 0
        """The call of the model that is being run; 0: none."""
        self.sets = OtherSets(layer.module for layer in self.layers)
        """Which of the layers have another set of statistics in place than when the batch began."""
        self.first_weights: dict[tuple[int, str | None], int] = {}
        """The version of each layer's affine weight at its first forward of this batch, by its index and set."""
        self.first_call: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None
        """The first outermost call of the latest batch without another set of statistics in use, of those with grad if
        there are any: what was called, and with what; None where that was computed by parameters."""
        self.first_samples = 0
        """Samples in it."""
        self._is_called: bool | None = None  # whether `first_call` had grad
        self.on_leave: Callable[[], None] | None = None
        """Called when an outermost call ends."""
        self.on_input: list[Callable[[Tensor], None]] = []
        """Called with the input of the first call of this training batch; they may not change anything."""
        self.pattern = BatchPattern()
        self._calls: list[Hashable] = []
        self._versions: list[int] = []
        self._parameters = [parameters_of(layer.module) for layer in self.layers]
        self.unsure = unsure(self.layers)
        """Indices of the layers whose count of batches may not tell whether their statistics moved."""
        self._sources: list[weakref.ref[Tensor]] = []
        self.wholes: list[weakref.ref[Tensor]] = []
        """The tensors that layers were given parts of in this batch."""
        self._depth = 0
        self._broken = False
        self._compiled = is_compiled(model)
        self._call_hooks: list[_CallHooks] = []
        self._layer_hooks: list[_LayerHooks] = []
        self._unhide: Callable[[], None] = lambda: None

    @property
    def calls(self) -> int:
        """How many outermost calls this batch has had."""
        return len(self._calls)

    @property
    def idle(self) -> bool:
        """Whether the hooks on the layers are off, as training batches are alike."""
        return bool(self._call_hooks) and not self._layer_hooks

    def attach(self, entries: Iterable[nn.Module]) -> None:
        """Set the hooks. `entries` are the modules whose calls count as calls of the model: the model itself, or what
        its training step calls."""
        parts = [module for module in dict.fromkeys(entries) if not isinstance(module, _BatchNorm)]
        self._call_hooks = [_CallHooks(self, place, module) for place, module in enumerate(parts)]
        self._unhide = scriptable(self.modules[0])
        self.watch_layers()

    def close(self) -> None:
        """Remove every hook."""
        self._leave_layers()
        for hooks in self._call_hooks:
            hooks.close()
        self._call_hooks = []
        self._unhide()
        self.recording = False

    def watch_layers(self) -> None:
        """Set the hooks on the layers, where they are not set."""
        if not self._layer_hooks:
            self._layer_hooks = [_LayerHooks(self, index, layer.module) for index, layer in enumerate(self.layers)]

    def _leave_layers(self) -> None:
        for hooks in self._layer_hooks:
            hooks.close()
        self._layer_hooks = []

    def begin(self, modes: Modes | None = None) -> None:
        """Begin a batch: what was recorded before is forgotten."""
        self.forwards = []
        self.entered_backward = set()
        self.modes = modes
        self.call = self.source = self.at = self._depth = 0
        self._sources, self.wholes, self._calls, self._is_called = [], [], [], None
        self.sets.rest()
        # Of a layer that is not watched now, the first forward of the batch will have been missed.
        first = enumerate(versions(self._parameters, "weight")) if self.idle else ()
        self.first_weights = {(index, None): version for index, version in first}
        self._versions = self._counts()
        self._broken = False
        self.recording = True

    def end(self) -> None:
        """Record nothing until the next `begin`."""
        self.recording = False
        self.on_input = []
        self._sources = []

    def _counts(self) -> list[int]:
        return writes([layer.module for layer in self.layers], self.unsure)

    def end_training_batch(self) -> None:
        """Like `end`; where the layers were not watched, the record is that of the usual batch, and what more was
        moved."""
        self.end()
        rises = list(map(sub, self._counts(), self._versions))
        usual = self.pattern.usual
        if not self.idle:
            alike = self.pattern.seen(BatchOutline(self._calls, rises, self.forwards, self.entered_backward))
            # Code that torch.compile made is made again whenever hooks come or go.
            if alike and not self._broken and not self._compiled:
                self._leave_layers()
        elif (self._calls, rises) == (usual.calls, usual.rises):
            self.forwards, self.entered_backward = usual.forwards, usual.entered_backward
        else:
            self.forwards, self.entered_backward = self.pattern.with_surplus(rises), usual.entered_backward
            self.pattern.broken()
            self.watch_layers()

    def watch_closely(self) -> None:
        """Watch every layer again, whatever batches were like so far."""
        self.pattern.forget()
        if self._call_hooks:
            self.watch_layers()

    def enter(
        self, module: nn.Module, layers: list[_BatchNorm], place: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Note that a call of a part of the model begins; the layers' hooks are set where it is unlike the usual
        one."""
        self._depth += 1
        if self._depth > 1:
            return
        input = next(nested_tensors((args, kwargs)), None)
        if (self._is_called is None or (not self._is_called and torch.is_grad_enabled())) and not (
            self.sets.are_in_use()
        ):
            self._is_called = torch.is_grad_enabled()
            self.first_call = None if input is None or input.requires_grad else (module, args, kwargs)
            self.first_samples = len(input) if input is not None and input.dim() else 0
        if self.on_input and input is not None and not self._calls:
            for look in self.on_input:
                look(input)
        self.open_call(input)
        self.at = self.call
        samples = tuple(input.shape[:1]) if input is not None else None
        self._calls.append(
            (place, samples, self.source, torch.is_grad_enabled(), in_backward(), self.sets.now(), *map(_flags, layers))
        )
        if self.idle and not self.pattern.follows(self._calls):
            self.forwards = self.pattern.before(self.call)
            self.pattern.broken()
            self._broken = True
            self.watch_layers()

    def leave(self) -> None:
        """Note that a call of a part of the model ended."""
        self._depth = max(self._depth - 1, 0)
        if not self._depth:
            self.at = 0
            if self.on_leave is not None:
                self.on_leave()

    def knows_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an earlier call of this batch had the same input."""
        input = next(nested_tensors((args, kwargs)), None)
        return input is not None and any(source() is input for source in self._sources)

    def open_call(self, input: Tensor | None) -> None:
        """Count a call of the model, or of a layer by itself, and find whether an earlier one had the same input."""
        if self.modes is None:
            self.modes = self.snapshot()
        self.call += 1
        self.source = len(self._sources) if input is None else _number(input, self._sources)


class _Hooks:
    """The hooks on one module. A copy of the module, made or pickled while it is watched, has hooks that do nothing."""

    _observer: Observer | None = None
    _boundary = UNBOUNDED
    _handles: tuple[RemovableHandle, ...] = ()

    def __init__(self, observer: Observer) -> None:
        self._observer, self._boundary = observer, observer.boundary

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class _CallHooks(_Hooks):
    """The two hooks of a part that a training step calls."""

    def __init__(self, observer: Observer, place: int, module: nn.Module) -> None:
        self._place = place
        self._layers = [part for part in module.modules() if isinstance(part, _BatchNorm)]
        super().__init__(observer)
        self._handles = (
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, always_call=True),
        )

    @guarded
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observer = self._observer
        if observer is None:
            return
        if torch.compiler.is_compiling():
            # Dynamo would take the attribute into what it compiles; `torch.export` without it runs this very code.
            if not torch.compiler.is_dynamo_compiling() and is_exporting():
                observer.exported = True
            return
        observer.exported = observer.exported or is_tracing()
        if observer.recording:
            observer.enter(module, self._layers, self._place, args, kwargs)

    @guarded
    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and self._observer is not None and self._observer.recording:
            self._observer.leave()


class _LayerHooks(_Hooks):
    """The two hooks of one layer."""

    def __init__(self, observer: Observer, index: int, layer: _BatchNorm) -> None:
        self._index = index
        self._unsure = index in observer.unsure
        self._before: int | None = None
        self._values: tuple[Tensor, Tensor] | None = None
        self._moves: bool | None = None
        super().__init__(observer)
        self._handles = (
            # First in, last out: the layer may have hooks that exchange its buffers for the length of a forward.
            layer.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            layer.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        )

    @guarded
    def _enter(self, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or self._observer is None or not self._observer.recording:
            return
        if not self._observer.at:
            self._observer.open_call(_input(args, kwargs))
        self._before = self._state(layer)
        if self._unsure and self._moves is None and layer.training and layer.running_mean is not None:
            self._values = running_mean(layer).clone(), running_var(layer).clone()

    @guarded
    def _leave(self, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or self._observer is None or not self._observer.recording:
            return
        observer, index, buffers, input = self._observer, self._index, buffers_of(layer), _input(args, kwargs)
        training, recomputed = layer.training, in_backward()
        tracking = layer.track_running_stats and buffers.get("running_mean") is not None
        now = self._state(layer)
        # Some tensors keep no version.
        if self._before is None or now is None or (now == self._before and is_deferred(layer)):
            moved = training and tracking and not recomputed and layer.momentum != 0
        elif self._unsure:
            moved = now != self._before or (training and tracking and not recomputed and self._found_moving(layer))
        else:
            moved = now != self._before and layer.momentum != 0
        weights = version(parameters_of(layer).get("weight")) or 0
        other_set = observer.sets.of(layer)
        reweighted = observer.first_weights.setdefault((index, other_set), weights) != weights
        call = observer.at or -observer.call
        failed = output is None
        shape = () if input is None else tuple(input.shape)
        part = None if input is None else divided(input)
        part_of = None if part is None else (_number(part[0], observer.wholes), part[1])
        seen = (training, moved and not failed, tracking, torch.is_grad_enabled(), recomputed, failed)
        observer.forwards.append(
            ForwardRecord(index, *seen, call, observer.source, reweighted, shape, other_set, part_of)
        )
        observer.seen.add(index)
        if reweighted and isinstance(output, Tensor) and output.requires_grad:
            entered = observer.entered_backward
            output.register_hook(lambda _: entered.add(call))

    def _state(self, layer: _BatchNorm) -> int | None:
        if self._unsure:
            return sum(writes([layer], {0}))
        return version(buffers_of(layer).get("num_batches_tracked"))

    def _found_moving(self, layer: _BatchNorm) -> bool:
        """Whether training forwards move the statistics: compared once, by their values, which waits for the device."""
        if self._moves is None and self._values is not None:
            before, self._values = self._values, None
            now = running_mean(layer), running_var(layer)
            self._moves = not all(torch.equal(one, two) for one, two in zip(before, now, strict=True))
        return bool(self._moves)


def _number(tensor: Tensor, known: list[weakref.ref[Tensor]]) -> int:
    """Return the place of `tensor` in `known`, at whose end it is put if it is new."""
    for number, each in enumerate(known):
        if each() is tensor:
            return number
    known.append(weakref.ref(tensor))
    return len(known) - 1


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    value = args[0] if args else kwargs.get("input")
    return value if isinstance(value, Tensor) else None


def nested_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from nested_tensors(item)
    elif isinstance(value, dict):
        yield from nested_tensors(list(value.values()))
