"""The deferred updates of a model: its layers' batches are put down in scratch rows during a forward, and settled for
all layers together when it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from itertools import repeat
from operator import is_, itemgetter, methodcaller
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging import Averaging, Batch
from lightning_bn.buffers import next_step
from lightning_bn.discovery import find_batch_norms, parts_called_by
from lightning_bn.layers.group import LayerGroup, WideScratch
from lightning_bn.layers.settlement import (
    ATTACHED,
    IDLE,
    MERGED,
    OBSERVED,
    SCRATCH,
    Neighbours,
    ScratchRows,
    advance,
    is_deferred,
    is_stopped,
    rule_of,
    rule_unless_kernel,
)
from lightning_bn.outermost import OutermostForward
from lightning_bn.torch_internals import buffer_of_each, buffers_of, innermost_transform

M = TypeVar("M", bound=nn.Module)

_SCRATCH, _ATTACHED = methodcaller("get", SCRATCH), methodcaller("get", ATTACHED)
_TRAINING = itemgetter("training")
_SWITCHES = itemgetter("training", "track_running_stats", "momentum")
_SKIPS, _MERGED = methodcaller("get", "skip_nonfinite", True), methodcaller("get", MERGED)
_MODULES, _AVERAGING = itemgetter("_modules"), methodcaller("get", "averaging")
_MOMENTUM = methodcaller("get", "momentum")
_REFERENT: Callable[[ref[Any]], Any] = ref.__call__

_PLANS = 16  # how many choices of layers, of those that train and those that don't, are kept ready


def settle_together(model: M) -> M:
    """Let the batch-norm layers of `model` settle their running statistics together, once at the end of each training
    forward of the model.

    `convert_batch_norm` and this package's callbacks do it themselves; call it on a model that is built of this
    package's layers. The running statistics are the same with and without it. What changes is the cost, which on a GPU
    is the number of kernels launched: about 60 for the whole model in place of up to 140 a layer. Until the outermost
    forward ends, ``running_mean``, ``running_var`` and ``num_batches_tracked`` hold what they held before the batch.

    The model, and each part of it that a training step may call by itself (its children, also those in containers),
    gets hooks. A layer that is called on its own, or inside compiled code, settles at once. Layers of plain torch stay
    untouched.

    Args:
        model: any module; may be called again after layers were added or replaced.

    Returns:
        `model` itself.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_bn import BatchNorm1d, Window, settle_together
        >>> windowed = BatchNorm1d(4, averaging=Window(20))
        >>> model = settle_together(nn.Sequential(nn.Linear(2, 4), windowed, nn.Linear(4, 4), BatchNorm1d(4)))
        >>> _ = model(torch.randn(8, 2))
        >>> model[1].num_batches_tracked.item()
        1
    """
    modules: list[nn.Module] = [model, *parts_called_by(model)]
    for module in dict.fromkeys(modules):
        release(module)
        layers = [layer.module for layer in find_batch_norms(module) if can_defer(layer.module)]
        if layers and layers != [module]:
            DeferredUpdates(layers).attach(module)
    return model


def release(module: nn.Module) -> None:
    """Take away the hooks that `settle_together` set on this very module."""
    for hook in list(module._forward_pre_hooks.values()):
        updates = getattr(hook, "__self__", None)
        if type(updates) is DeferredUpdates:
            if updates.is_running():  # what its layers have done in this forward counts
                updates.end()
                updates.abort()
            updates.detach()
            updates.uninstall()
    for layer in find_batch_norms(module):
        for updates in list(layer.module.__dict__.get(IDLE, [])):
            if module in updates.modules:
                updates.end_idling()
                updates.uninstall()


def can_defer(layer: nn.Module) -> bool:
    """Whether the layer's forward can write scratch rows: this package's, and that of others which `attach_averaging`
    or `observe` has put hooks around."""
    return getattr(type(layer), "can_defer", False) or ATTACHED in layer.__dict__ or OBSERVED in layer.__dict__


def exchanging(layers: Iterable[_BatchNorm], exchange: Callable[[], None]) -> None:
    """Call `exchange`, which gives `layers` other statistics, also in the middle of a forward of their model.

    Raises:
        RuntimeError: another thread is in the middle of one.
    """
    rows = [layer.__dict__[SCRATCH] for layer in layers if is_deferred(layer)]
    running = {id(each.updates): each.updates for each in rows}
    for updates in running.values():
        if not updates.is_running():  # interrupted
            updates.abort()
            continue
        if updates.thread != threading.get_ident():
            raise RuntimeError(
                "The statistics of a model can't be exchanged while another thread runs it. Let each thread run it "
                "inside of `with sets.use(name):`, so that one waits for the other."
            )
        exchange = partial(updates.around, exchange)
    exchange()


class DeferredUpdates(OutermostForward):
    """Gives `layers` scratch rows when the outermost forward of a module begins, and settles when it ends.

    Args:
        layers: which are below that module.
    """

    merges = False
    """Whether the statistics are those of several ranks. To updates that merge all others yield."""

    def __init__(self, layers: Iterable[_BatchNorm]) -> None:
        super().__init__()
        self.layers = [
            layer for layer in layers if layer.running_mean is not None and layer.num_batches_tracked is not None
        ]
        self.thread = 0
        self.was_idle = False
        self.later: list[tuple[_BatchNorm, Averaging, Batch]] = []
        """Batches that other threads have run through the layers meanwhile."""
        self._plans: dict[tuple[Any, ...], list[LayerGroup]] = {}
        self.rounds: list[list[tuple[LayerGroup, WideScratch]]] = []
        """What is not settled yet: of a layer that is called again in a forward, a round for each call."""
        self._groups: list[LayerGroup] = []
        self.round = 0
        """The number of the round that is under way, 0 while there is none."""
        self._last = 0
        self._facts: list[Any] = []
        self._followed: list[ref[Any]] = []
        self._given: list[WideScratch] = []
        self._installed: list[ScratchRows | None] = []

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if innermost_transform() is not None:
            return False
        attributes = list(map(vars, self.layers))
        if not any(map(_TRAINING, attributes)):
            return False  # also in torch.jit.trace, to which a size that is compared becomes a part of the program
        if list(map(_SCRATCH, attributes)) != self._installed and self._is_inside():
            return False
        self._choose(attributes)
        if not self._groups:
            return False
        self._begin_round()
        return True

    def _is_inside(self) -> bool:
        """Whether a forward of a model around this one has begun already."""
        for layer in self.layers:
            if is_deferred(layer):
                updates = layer.__dict__[SCRATCH].updates
                if updates.is_running():
                    if not updates.merges:  # for as long as the ranks meet, and no longer
                        self.idle()
                    return True
                updates.abort()
        return False

    def idle(self) -> None:
        """Take the hooks away until a layer finds that it has no scratch rows: most parts of a model never run but
        inside of it, and a hook costs at every step."""
        if not self.was_idle:
            self.was_idle = True
            self.detach()
            for layer in self.layers:
                layer.__dict__.setdefault(IDLE, Neighbours()).append(self)

    def resume(self) -> None:
        """Set the hooks again, and never idle again."""
        self.end_idling()
        self.attach(*self.modules)

    def end_idling(self) -> None:
        """Let the layers forget these updates."""
        for layer in self.layers:
            idle = layer.__dict__.get(IDLE, [])
            if self in idle:
                idle.remove(self)
            if not idle:
                layer.__dict__.pop(IDLE, None)

    def end(self) -> None:
        with torch.no_grad():
            for round_ in self.rounds:
                for group, wide in round_:
                    _settle(group, wide)
        self.rounds = []

    def close(self) -> None:
        self.rounds = []
        self.round = 0
        later, self.later = self.later, []
        for layer, averaging, batch in later:
            advance(layer, averaging, Batch(batch.mean, batch.var, batch.count, next_step(layer), batch.valid))

    def next_round(self, layer: _BatchNorm) -> ScratchRows:
        """Begin another round, for a layer that is called again, and return its rows. A forward that fails leaves no
        trace of any, so all are settled when it ends."""
        self._begin_round()
        scratch: ScratchRows = layer.__dict__[SCRATCH]
        return scratch

    def _begin_round(self) -> None:
        self.thread = threading.get_ident()
        self._last += 1
        earlier = [wide for _, wide in self.rounds[-1]] if self.rounds else [None] * len(self._groups)
        with torch.no_grad():
            round_ = [
                (group, group.scratch(self, len(self.rounds), wide))
                for group, wide in zip(self._groups, earlier, strict=True)
            ]
        for _, wide in round_:
            wide.round = self._last
        given = [wide for _, wide in round_]
        if given != self._given or list(map(_SCRATCH, map(vars, self.layers))) != self._installed:
            self._install(round_)
        self.rounds.append(round_)
        self.round = self._last  # when all is ready

    def _install(self, round_: list[tuple[LayerGroup, WideScratch]]) -> None:
        self._given = [wide for _, wide in round_]
        rows = {layer: part for group, wide in round_ for layer, part in zip(group.layers, wide.parts, strict=True)}
        self._installed = list(map(rows.get, self.layers))
        for layer, part in zip(self.layers, self._installed, strict=True):
            layer.__dict__[SCRATCH] = part

    def uninstall(self) -> None:
        """Take the rows away from the layers."""
        for layer in self.layers:
            scratch = layer.__dict__.get(SCRATCH)
            if scratch is not None and scratch.updates is self:
                del layer.__dict__[SCRATCH]
        self._installed = []

    def _choose(self, attributes: list[dict[str, Any]]) -> None:
        """Choose the groups; anew only if something has changed that the choice depends on, which is found out without
        running any Python for a layer."""
        means = buffer_of_each(self.layers, "running_mean")
        averagings = list(map(_AVERAGING, map(_MODULES, attributes)))
        facts = [
            averagings,
            list(map(_MOMENTUM, map(getattr, averagings, repeat("__dict__"), repeat({})))),
            list(map(_SWITCHES, attributes)),
            list(map(_SKIPS, attributes)),
            list(map(_MERGED, attributes)),
            list(map(getattr, means, repeat("shape"), repeat(None))),
            list(map(getattr, means, repeat("dtype"), repeat(None))),
            list(map(getattr, means, repeat("device"), repeat(None))),
        ]
        if any(map(_ATTACHED, attributes)):
            for layer in self.layers:
                if ATTACHED in layer.__dict__ and layer.training:
                    layer.__dict__[ATTACHED].set_again(layer)
        if (
            facts == self._facts
            and all(map(is_, map(_REFERENT, self._followed), means))
            and all(group.is_tied() for group in self._groups)
        ):
            return
        signature = self._signature()
        groups = self._plans.get(signature) if any(signature) else []
        if groups is None or not all(group.is_tied() for group in groups):
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            groups = self._plans[signature] = self._grouped(signature)
        self._groups = groups
        for group in self._groups:
            group.take_momenta()
        self._facts = facts
        self._followed = [ref(layer if mean is None else mean) for layer, mean in zip(self.layers, means, strict=True)]

    def around(self, exchange: Callable[[], None]) -> None:
        """Settle what has run so far in this forward, call `exchange`, which gives the layers other statistics, and go
        on with those."""
        self.end()
        self.rounds, self.round = [], 0
        exchange()
        self._choose(list(map(vars, self.layers)))
        if self._groups:
            self._begin_round()

    def _signature(self) -> tuple[Any, ...]:
        """What decides which layers are settled together, for each of them; None for one whose statistics don't
        move."""
        merging = self.merges
        rule_told = rule_of if merging else rule_unless_kernel
        found: list[Any] = []
        for layer in self.layers:
            attributes, mean = layer.__dict__, buffers_of(layer)["running_mean"]
            moves = attributes["training"] and layer.track_running_stats and not is_stopped(layer)
            if mean is None or not moves or (not merging and MERGED in attributes):
                found.append(None)
                continue
            rule = rule_told(layer)
            if rule is not None:
                rule.follow(mean)
            found.append((rule, mean.dtype, mean.device, len(mean), attributes.get("skip_nonfinite", True)))
        return tuple(found)

    def _grouped(self, signature: tuple[Any, ...]) -> list[LayerGroup]:
        members: dict[tuple[Any, ...], list[tuple[_BatchNorm, Averaging | None]]] = {}
        for layer, sign in zip(self.layers, signature, strict=True):
            if sign is not None:
                rule, dtype, device, _, skip_nonfinite = sign
                key = (_kind(rule), dtype, device, skip_nonfinite)
                members.setdefault(key, []).append((layer, rule))
        return [
            LayerGroup(
                [layer for layer, _ in pairs], [rule for _, rule in pairs if rule is not None], skip_nonfinite=key[-1]
            )
            for key, pairs in members.items()
        ]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            **{name: [] for name in ("later", "rounds", "_groups", "_facts", "_followed", "_given", "_installed")},
            "_plans": {},
            "round": 0,
        }


def _kind(rule: Averaging | None) -> tuple[Any, ...]:
    """What rules must have in common to be one; None is the kernel."""
    if rule is None:
        return (None,)
    settings = rule.settings()
    # A setting of another type may be equal now and change in place later, for one layer alone.
    alike = rule.elementwise and all(
        isinstance(value, (bool, int, float, str, type(None))) for value in settings.values()
    )
    return (type(rule), *settings.items()) if alike else (type(rule), id(rule) if rule.elementwise else None)


def _settle(group: LayerGroup, wide: WideScratch) -> None:
    if not any(wide.ran()):
        return
    batch = None
    if not group.rules and group.is_listened_to():
        moments = [scratch.batch or (scratch.mean, scratch.var) for scratch in wide.parts]
        batch = torch.cat([mean for mean, _ in moments]), torch.cat([var for _, var in moments])
    group.settle(group.collect(wide), batch)
