"""When and where layers are looked at: at which steps, and at which of their calls in a forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.activations.functional_calls import FunctionalCalls
from lightning_bn.averaging import Averaging
from lightning_bn.discovery import parts_called_by, user_name
from lightning_bn.error_boundary import UNBOUNDED, ErrorBoundary, guarded
from lightning_bn.torch_internals import divided, in_backward, module_in_forward

# A layer that is called more often in one forward stands in a loop; the last place holds all further calls.
MAX_CALLS = 16

# Samples at each interval before it doubles: enough columns of a heat map for a run of any length.
SAMPLES = 16

INPUT = "input"
"""The path of what the model is given."""


class CallSite(NamedTuple):
    """A call site: the path under which the layer was called, which of its calls in a forward it is, from 1, and the
    set of statistics that it had, if it was another than between batches."""

    path: str
    call: int
    other_set: str | None = None

    @property
    def name(self) -> str:
        """The path and the set: ``bn1@adversarial``."""
        return self.path if self.other_set is None else f"{self.path}@{self.other_set}"


def label_of(place: CallSite, is_alone: bool) -> str:
    """Return the name of a place's row: the path, with ``@`` and another set of statistics that it had, and
    with ``#1``, ``#2`` where a forward calls it several times."""
    return place.name if is_alone else f"{place.name}#{place.call}"


@dataclass
class _Track:
    """Which modules are running, innermost last, and how often each path was called since the outermost of them
    began."""

    running: list[tuple[str, Counter[str]]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    parts: dict[str, tuple[ref[Tensor], Hashable]] = field(default_factory=dict)
    """Of what the newest call of a path was given a part."""

    def goes_on(self, path: str, given: Tensor) -> bool:
        """Whether `given` is another part of what the call of `path` before was given a part of."""
        former, part = self.parts.pop(path, None), divided(given)
        if part is None:
            return False
        self.parts[path] = ref(part[0]), part[1]
        return former is not None and former[0]() is part[0] and former[1] == part[1]


class CallSites:
    """Finds the place of each call of a layer, with hooks on the modules around the layers.

    Calls are counted anew for each call of the outermost module: the model, or the part of it that a training step
    calls. So both views of a self-supervised step are one place, and the two uses of a block's ReLU are two. Of a
    module that has several names the one under the running module counts; in an `nn.Sequential`, the one whose turn it
    is.

    Args:
        model: which holds the layers.
        layers: their names.
        step_is_forward: whether the model's own forward stands for a whole training step, as under DDP.
        given: called with the arguments of each outermost call.
        gave: called with what it returned.
        called: called with the name, the place and the result of each activation function that is not a module; None:
            nobody wants to know.
        boundary: stands around every hook.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Collection[str],
        *,
        step_is_forward: bool = False,
        given: Callable[[tuple[Any, ...], Mapping[str, Any]], None],
        gave: Callable[[Any], None],
        called: Callable[[str, CallSite, Tensor], None] | None = None,
        boundary: ErrorBoundary = UNBOUNDED,
    ) -> None:
        self._boundary = boundary
        self._given, self._gave, self._called = given, gave, called
        self._root = type(model).__name__
        self._functions = ExitStack()  # holds what sees functions, while a forward runs
        self._mode: FunctionalCalls | None = None  # that
        self._sees_functions = called is not None
        self._step_is_forward = step_is_forward
        named = {user_name(path): module for path, module in model.named_modules(remove_duplicate=False)}
        paths: dict[nn.Module, list[str]] = {}
        for path, module in named.items():
            paths.setdefault(module, []).append(path)
        self._aliases = {name: paths[named[name]] for name in layers if len(paths[named[name]]) > 1}
        known = sorted({path for name in layers for path in self._aliases.get(name, [name])})
        parts = {model, *parts_called_by(model)}  # what a training step may call first
        self._below: dict[str, list[str]] = {}
        self._around: dict[str, nn.Module] = {}
        for module, (name, *_) in paths.items():
            below = [path for path in known if path != name and (not name or path.startswith(f"{name}."))]
            # Code that torch.jit compiled takes no hook.
            calls_functions = called is not None and _may_call_functions(module)
            if (below or module in parts or calls_functions) and not isinstance(module, torch.jit.ScriptModule):
                self._around[name], self._below[name] = module, below
        self._sequences = {name for name, module in self._around.items() if isinstance(module, nn.Sequential)}
        self.restart()

    def restart(self) -> None:
        """Count from 1 again: a batch begins."""
        self._forward, self._again = _Track(), _Track()

    def attach(self, hooks: ExitStack, layers: Iterable[nn.Module], fused: Collection[nn.Module] = ()) -> None:
        """Place the hooks, until `hooks` is closed; none on what torch is to run fused, nor then a mode that sees
        functions, which would prevent it too."""
        self.restart()
        self._sees_functions = self._called is not None and not fused
        hooks.push(self._functions)
        for layer in layers if self._sees_functions else ():
            if not _may_call_functions(layer):
                hooks.callback(layer.register_forward_pre_hook(self._pause_functions).remove)
        for name, module in self._around.items():
            if module in fused:
                continue
            enter, leave = partial(self._enter, name), partial(self._leave, name)
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)

    @guarded
    def _pause_functions(self, module: nn.Module, args: Any) -> None:
        if self._mode is not None:
            self._mode.pause()

    def resume_functions(self) -> None:
        """See functions again: one of the layers has run, within which none is looked at."""
        if self._mode is not None:
            self._mode.resume()

    def of(self, name: str, given: Tensor | None, other_set: str | None, *, is_again: bool) -> CallSite:
        """Return the place of the call of layer `name` that has just run on `given`, with another set of statistics if
        it is named, and `in_backward` or not. Parts of one batch, as a ghost batch norm cuts it up, are one place."""
        track = self._again if is_again else self._forward
        path = self._path(name, track) if name in self._aliases else name
        key = path if other_set is None else CallSite(path, 1, other_set).name
        before = track.calls[key]
        goes_on = given is not None and track.goes_on(key, given) and before > 0
        track.calls[key] = number = before if goes_on else before + 1
        return CallSite(path, min(number, MAX_CALLS), other_set)

    @guarded
    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # What activation checkpointing repeats is counted apart, and is given nothing new.
        is_again = in_backward()
        track = self._again if is_again else self._forward
        is_step = self._step_is_forward and not name and not track.running
        if self._is_outermost(name, track):
            functions = [path for path in track.calls if ":" in path or "@" in path]
            below = [path for path in functions if not name or path.startswith((f"{name}.", f"{name}:"))]
            for path in (*self._below[name], *below):
                del track.calls[path]
            if not is_again and not is_step:
                self._given(args, kwargs)
        if self._sees_functions and not track.running:
            self._functions.close()  # of a forward that an interrupt left
            self._mode = self._functions.enter_context(FunctionalCalls(self._see_function, self._boundary))
        track.running.append((name, Counter()))

    @guarded
    def _leave(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        is_again = in_backward()
        track = self._again if is_again else self._forward
        while track.running and track.running.pop()[0] != name:
            """A module that an interrupt left without calling its hook."""
        if not track.running:
            self._functions.close()
        if not is_again and (self._below[name] or self._called is not None) and self._is_outermost(name, track):
            self._gave(output)

    def _see_function(self, function: str, result: Tensor) -> None:
        track = self._again if in_backward() else self._forward
        if self._called is None or not track.running:
            return
        holder, turns = track.running[-1]
        # Inside of a module without hooks, as nn.ReLU is, that is its own row or nobody's; and hooks are no forward.
        module = module_in_forward()
        if module is None or module is not self._around[holder] or not _may_call_functions(module):
            return
        turns[function] += 1
        name = f"{holder or self._root}:{function}[{turns[function]}]"
        track.calls[name] += 1
        self._called(name, CallSite(name, min(track.calls[name], MAX_CALLS)), result)

    def _is_outermost(self, name: str, track: _Track) -> bool:
        if not self._step_is_forward:
            return not track.running
        return not track.running or (track.running[0][0] == "" and (len(track.running) == 1 or not name))

    def _path(self, name: str, track: _Track) -> str:
        aliases = self._aliases[name]
        for holder, turns in reversed(track.running):
            prefix = f"{holder}." if holder else ""
            inside = [path for path in aliases if path.startswith(prefix) and path != holder]
            own = [path for path in inside if "." not in path[len(prefix) :]]
            if holder in self._sequences and own:
                turns[name] += 1
                return own[min(turns[name], len(own)) - 1]
            if inside:
                return (own or inside)[0]
        return name


def interval_at(step: int, longest: int, samples: int = SAMPLES) -> int:
    """Return the interval at which a growing run is looked at: 1 at first, and twice as long after every 16 samples, or
    as many as `samples` says, until it is `longest`.

    Example:
        >>> steps = [step for step in range(176) if step % interval_at(step, 50) == 0]
        >>> len(steps), steps[14:20], steps[-2:]
        (56, [14, 15, 16, 18, 20, 22], [160, 168])
    """
    interval, until = 1, samples
    while step >= until and interval < longest:
        interval *= 2
        until += samples * interval
    return min(interval, longest)


def _may_call_functions(module: nn.Module) -> bool:
    """Whether a module's forward may call an activation function: torch's own without parts don't, but for those that
    are one."""
    is_torchs = type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())
    return not is_torchs and not isinstance(module, (_BatchNorm, Averaging))
