"""Layers that follow one rule, as one wide layer of all their channels: whatever is one number a layer is given per
channel."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from operator import attrgetter, eq, is_, itemgetter, methodcaller
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging import Averaging, Batch
from lightning_bn.buffers import running_mean
from lightning_bn.layers.settlement import ATTACHED, LISTENERS, OBSERVED, ScratchRows, Settled, kernel_momentum
from lightning_bn.torch_internals import add_each, buffer_of_each, copy_each


@dataclass(eq=False)
class WideScratch:
    """The scratch rows of all layers of a group for a forward, cut up into those of each layer.

    Autograd keeps the rows for backward, where training does not read them: it takes the moments that the kernel has
    kept. So they are used again in the next forward, and whoever writes them does so behind autograd's back, as the
    kernel does, through `writable`.
    """

    rows: Tensor  # (2 C,), the means and then the variances
    writable: Tensor  # the same memory
    before: Tensor | None  # (2 C,), the running statistics when the forward began, where the kernel averages
    pieces: Sequence[Tensor]  # the layers' parts: L of the means, L of the variances
    parts: Sequence[ScratchRows]
    is_later: bool  # whether they are those of a further round, before which the first is not settled
    round: int = 0  # the number of the round in which they were given out last

    def ran(self) -> list[bool]:
        """Whether each layer ran."""
        return list(map(eq, map(_ROUND, self.parts), repeat(self.round)))


_ROUND, _COUNT, _SHAPE = attrgetter("round"), attrgetter("count"), attrgetter("shape")
_TIE = itemgetter("tie")
_LISTENERS = methodcaller("get", LISTENERS)


@dataclass(frozen=True)
class Collected:
    """What the layers of a group have reported of one forward, side by side."""

    mean: Tensor  # (C,): of the batch, or where the kernel computes the average, the new running mean
    var: Tensor  # (C,): *unbiased*, likewise
    count: Tensor  # (L,), floating: values per channel, 0 for a layer that did not run
    valid: Tensor | None  # (L,), bool: which layers' batches count; None if all do
    ran: Sequence[bool] = ()  # which layers ran, for listeners
    wide: WideScratch | None = None  # if these are the rows that were given out
    before: Tensor | None = None  # (2 C,), the running statistics before the batch, where they are known already


class _WideBatch(Batch):
    """The batches of all layers of a group. `count` and `step`, which few rules ask for, are made when one does."""

    _collected: Collected
    _group: LayerGroup

    @classmethod
    def of(cls, collected: Collected, group: LayerGroup) -> _WideBatch:
        """Return what the layers have reported, number by number a channel."""
        batch = cls.__new__(cls)
        valid = None if collected.valid is None else group.widened(collected.valid)
        batch.__dict__.update(mean=collected.mean, var=collected.var, valid=valid, _collected=collected, _group=group)
        return batch

    @cached_property
    def count(self) -> Tensor:
        return self._group.widened(self._collected.count)

    @cached_property
    def step(self) -> Tensor:
        return self._group.widened(self._group.next_steps())


class LayerGroup:
    """Layers with one rule, dtype and device.

    Args:
        layers: at least one.
        rules: the averaging of each, all of the same settings; empty if the kernel computes the averages itself.
        skip_nonfinite: whether a batch that is not finite leaves no trace.
        private: whether nobody else holds the layers' buffers. Then these lie side by side too, and settling gathers
            nothing.
    """

    def __init__(
        self,
        layers: Sequence[_BatchNorm],
        rules: Sequence[Averaging],
        *,
        skip_nonfinite: bool,
        private: bool = False,
    ) -> None:
        self.layers = list(layers)
        self.rules = list(rules)
        self.skip_nonfinite = skip_nonfinite
        self.sizes = [len(running_mean(layer)) for layer in self.layers]  # read: channels may be removed
        self._channels = sum(self.sizes)
        like = running_mean(self.layers[0])
        self.dtype, self.device = like.dtype, like.device
        self._wide_dtype = torch.promote_types(self.dtype, torch.float32)  # of moments
        with torch.inference_mode(False):  # it outlives the forward, which may be in that mode
            self._set_up(private)

    def _set_up(self, private: bool) -> None:
        places, sizes = torch.arange(len(self.sizes), device="cpu"), torch.tensor(self.sizes, device="cpu")
        owner = torch.repeat_interleave(places, sizes, output_size=self._channels)
        self._owner = owner.to(self.device, non_blocking=True)  # (C,): the place of the layer that a channel belongs to
        self._owner_twice = owner.repeat(2).to(self.device, non_blocking=True)
        self._known: dict[tuple[Any, ...], Tensor] = {}
        self._own = [
            rule
            for layer, rule in zip(self.layers, self.rules, strict=False)
            if layer._modules.get("averaging") is rule
        ]
        self._rule = self._tied_rule() if self.rules and self.rules[0].elementwise else None
        self._tied = self._tied_buffers() if private else None
        # One for each layer whose batch counts, and views of them: cutting them up again each time costs more.
        self._ticks = torch.zeros(len(self.layers), dtype=torch.int64, device=self.device)
        self._tick_of_each = list(self._ticks.unbind())
        # The forward of another class may do anything with its rows, also behind which autograd does look.
        self._reuses = not any(ATTACHED in layer.__dict__ or OBSERVED in layer.__dict__ for layer in self.layers)
        self._wide: list[WideScratch] = []

    def scratch(self, updates: Any, place: int, earlier: WideScratch | None) -> WideScratch:
        """Return rows for each layer; those of one `place` are the same tensors in each forward. `earlier` are those of
        the round before in this forward, which is not settled yet."""
        start = None
        if earlier is not None and not self.rules:
            collected = self.collect(earlier)
            before = self._statistics() if collected.before is None else collected.before
            start = self._masked(self._averaged(collected), collected, before)
        if place >= len(self._wide):
            wide = self._new_rows(updates, start)
            self.take_momenta(wide)
            if self._reuses:
                self._wide.append(wide)
            return wide
        wide = self._wide[place]
        if wide.before is None:
            wide.writable.zero_()
        else:
            torch.cat(self._running() if start is None else [start], out=wide.before)
            wide.writable.copy_(wide.before)
        return wide

    def take_momenta(self, *new: WideScratch) -> None:
        """Take note of the momenta that the layers have now, in `new` rows or else in all that there are."""
        for wide in new or self._wide:
            for layer, scratch in zip(self.layers, wide.parts, strict=True):
                scratch.momentum = None if self.rules else kernel_momentum(layer)
                scratch.layer_momentum = layer.__dict__["momentum"]

    def _new_rows(self, updates: Any, start: Tensor | None) -> WideScratch:
        with torch.inference_mode(False):
            before = None if self.rules else torch.cat(self._running() if start is None else [start])
            if before is None:
                rows = torch.zeros(2 * self._channels, dtype=self.dtype, device=self.device)
            else:
                rows = before.clone()
        pieces = rows.split(self.sizes * 2)
        parts = [ScratchRows(updates, mean, var) for mean, var in zip(pieces, pieces[len(self.layers) :], strict=False)]
        return WideScratch(rows, rows.data, before, pieces, parts, start is not None)

    def collect(self, wide: WideScratch) -> Collected:
        """Put the reports of one forward side by side."""
        parts, ran = wide.parts, wide.ran()
        usual = all(ran) and None not in map(_SHAPE, parts)
        own = not usual and any(scratch.own_rows for scratch in parts)
        both = (
            torch.cat([*(scratch.mean for scratch in parts), *(scratch.var for scratch in parts)]) if own else wide.rows
        )
        mean, var = self._halves(both)
        if usual:
            counts, valid = self._constant("number", tuple(map(_COUNT, parts)), self._wide_dtype), None
        else:
            counts = self.numbers([scratch.count if yes else 0 for scratch, yes in zip(parts, ran, strict=True)])
            valid = self._valid(parts, ran)
        if self.skip_nonfinite:
            valid = self.finite(var) if valid is None else valid & self.finite(var)
        # A layer that did not run keeps what it holds now.
        before = wide.before if wide.is_later or all(ran) else None
        return Collected(mean, var, counts, valid, ran, None if own else wide, before)

    def settle(self, collected: Collected, batch: tuple[Tensor, Tensor] | None = None) -> None:
        """Update the running statistics of all layers.

        Args:
            collected: as from `collect`.
            batch: mean and *unbiased* variance of the batch, (C,) each, where the kernel made new running statistics of
                them in `collected`; for listeners.
        """
        both = self._statistics() if collected.before is None else collected.before
        before = self._halves(both)
        if self._tied is None:  # nobody listens to the private ones
            self._notify(collected, batch, before)
        new = torch.cat(self._updated(collected, before)) if self.rules else self._averaged(collected)
        self._write(self._masked(new, collected, both), collected.wide)
        self._count(collected.valid)

    def _averaged(self, collected: Collected) -> Tensor:
        """The averages that the kernel has computed: (2 C,)."""
        return torch.cat((collected.mean, collected.var)) if collected.wide is None else collected.wide.rows

    def _masked(self, new: Tensor, collected: Collected, before: Tensor) -> Tensor:
        """New statistics where a layer's batch counts, those before it elsewhere: (2 C,)."""
        if collected.valid is None:
            return new
        valid = collected.valid.index_select(0, self._owner_twice)
        out = None if collected.wide is None else collected.wide.writable
        return torch.where(valid, new.to(self.dtype), before, out=out)

    def _updated(self, collected: Collected, before: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self._rule is None:
            return self._update_each(collected, before, self.next_steps())
        updated = self._rule.update(*before, _WideBatch.of(collected, self))
        self._check_state(self._rule)
        return updated

    def _write(self, new: Tensor, wide: WideScratch | None) -> None:
        if self._tied is not None:
            self._tied[0].copy_(new)
            return
        if wide is None:
            pieces: Sequence[Tensor] = new.split(self.sizes * 2)
        else:
            pieces = wide.pieces  # cut up already
            if new is not wide.rows and new is not wide.writable:
                wide.writable.copy_(new)
        copy_each(self._running(), list(pieces))

    def _count(self, valid: Tensor | None) -> None:
        if self._tied is not None:
            self._tied[1].add_(1 if valid is None else valid)
            return
        if valid is not None:
            self._ticks.copy_(valid)
        add_each(buffer_of_each(self.layers, "num_batches_tracked"), None if valid is None else self._tick_of_each)

    def finite(self, var: Tensor) -> Tensor:
        """Whether the moments of a layer's batch are finite, told by its variances: (L,) bool."""
        largest = torch.zeros(len(self.layers), dtype=var.dtype, device=self.device)
        return largest.scatter_reduce_(0, self._owner, var, "amax") < math.inf  # the maximum of a NaN is NaN

    def widened(self, per_layer: Tensor) -> Tensor:
        """Repeat a number a layer, (L,), for each of its channels, (C,)."""
        return per_layer.index_select(0, self._owner)

    def numbers(self, values: Sequence[int | Tensor]) -> Tensor:
        """Return a number for each layer as a tensor, (L,), in the dtype of moments."""
        dtype = self._wide_dtype
        if {int}.issuperset(map(type, values)):
            return self._constant("number", tuple(values), dtype)
        return torch.stack(
            [
                value.to(dtype).reshape(())
                if isinstance(value, Tensor)
                else torch.full((), value, dtype=dtype, device=self.device)
                for value in values
            ]
        )

    def next_steps(self) -> Tensor:
        """How many batches each layer has taken in, the one at hand included: (L,)."""
        return 1 + (
            torch.stack(buffer_of_each(self.layers, "num_batches_tracked")) if self._tied is None else self._tied[1]
        )

    def flags(self, values: Sequence[bool]) -> Tensor:
        """Return a truth for each layer as a tensor, (L,) bool."""
        return self._constant("flag", tuple(values), torch.bool)

    def is_listened_to(self) -> bool:
        """Whether anybody wants to know the batches of any of the layers."""
        return any(map(_LISTENERS, map(vars, self.layers)))

    def is_tied(self) -> bool:
        """Whether the layers' averagings still are what this group took them for."""
        return self._rule is None or all(map(is_, map(_TIE, map(vars, self._own)), repeat(self)))

    def _running(self) -> list[Tensor]:
        return [*buffer_of_each(self.layers, "running_mean"), *buffer_of_each(self.layers, "running_var")]

    def _statistics(self) -> Tensor:
        """All running means and then all running variances: (2 C,)."""
        return torch.cat(self._running()) if self._tied is None else self._tied[0]

    def _halves(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Cut means and variances apart; in the dtype in which they are averaged, where that is not the kernel's."""
        mean, var = (both.to(self._wide_dtype) if self.rules else both).split(self._channels)
        return mean, var

    def _valid(self, parts: Sequence[ScratchRows], ran: Sequence[bool]) -> Tensor | None:
        """Which layers' batches count, whatever is in them."""
        valid = None if all(ran) else self.flags(ran)
        if any(scratch.valid is not None for scratch in parts):
            yes = self.flags([True])[0]
            own = torch.stack([yes if scratch.valid is None else scratch.valid for scratch in parts])
            valid = own if valid is None else valid & own
        return valid

    def _constant(self, what: str, values: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        """Return numbers of the host's on the device; remembered, since most forwards are alike and a copy costs more
        than what is done with it."""
        key = (what, values)
        if key not in self._known:
            if len(self._known) >= 64:
                self._known.clear()
            self._known[key] = torch.tensor(values, dtype=dtype, device="cpu").to(self.device, non_blocking=True)
        return self._known[key]

    def _notify(self, collected: Collected, batch: tuple[Tensor, Tensor] | None, before: tuple[Tensor, Tensor]) -> None:
        if self.is_listened_to():
            listeners = {id(each): each for layer in self.layers for each in layer.__dict__.get(LISTENERS, ())}
            count = collected.count if collected.valid is None else torch.where(collected.valid, collected.count, 0.0)
            # Copies: the rows are written once more.
            mean, var = (collected.mean.clone(), collected.var.clone()) if batch is None else batch
            settled = Settled(self.layers, mean, var, count, collected.ran, before)
            for listener in listeners.values():
                listener(settled)

    @torch.no_grad()
    def _tied_rule(self) -> Averaging:
        """Lay the layers' states side by side, each layer's own a view of it, and return the averaging that has the
        whole."""
        rule = copy.copy(self.rules[0])
        self._state: dict[str, Tensor] = {}
        with torch.inference_mode(False):
            for name in rule.state():
                wide = self._state[name] = torch.cat([getattr(own, name) for own in self.rules], dim=-1)
                rule.__dict__[name] = wide
                for own, part in zip(self.rules, wide.split(self.sizes, dim=-1), strict=True):
                    own.__dict__[name] = part
        for own in self._own:
            own.__dict__["tie"] = self
        return rule

    @torch.no_grad()
    def _tied_buffers(self) -> tuple[Tensor, Tensor]:
        """Lay the layers' buffers side by side, each layer's own a view: all statistics, (2 C,), and all counts."""
        both, steps = torch.cat(self._running()), torch.stack(buffer_of_each(self.layers, "num_batches_tracked"))
        pieces = both.split(self.sizes * 2)
        for place, layer in enumerate(self.layers):
            layer.running_mean, layer.running_var = pieces[place], pieces[place + len(self.layers)]
            layer.num_batches_tracked = steps[place]
        return both, steps

    def _check_state(self, rule: Averaging) -> None:
        for name, tensor in self._state.items():
            if getattr(rule, name) is not tensor:
                raise TypeError(
                    f"{type(rule).__name__}.update assigns self.{name}, of which each layer holds a part. Write it in "
                    f"place: batch.write(self.{name}, value)."
                )

    def _update_each(self, collected: Collected, before: tuple[Tensor, Tensor], steps: Tensor) -> tuple[Tensor, Tensor]:
        """The same for a rule that is not known to be elementwise: layer by layer, as it was written."""
        # Copies: a rule may keep what it is given.
        wide = *before, collected.mean.clone(), collected.var.clone()
        found = []
        for place, (rule, *running, mean, var) in enumerate(
            zip(self.rules, *(each.split(self.sizes) for each in wide), strict=True)
        ):
            valid = None if collected.valid is None else collected.valid[place]
            batch = Batch(mean, var, collected.count[place], steps[place], valid)
            found.append(rule.update(running[0], running[1], batch))
        means, variances = zip(*found, strict=True)
        return torch.cat(means), torch.cat(variances)
