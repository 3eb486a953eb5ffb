"""Layers that follow one rule, as one wide layer of all their channels: whatever is one number a layer is given per
channel."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging import Averaging, Batch
from lightning_bn.buffers import running_mean
from lightning_bn.layers.settlement import ATTACHED, LISTENERS, OBSERVED, Loan, Settled, kernel_momentum
from lightning_bn.torch_internals import add_each, buffers_of, copy_each

__all__ = ["Group", "Lent", "Rows"]


@dataclass(frozen=True)
class Lent:
    """What a group lends for a forward: the rows of all layers, cut up, and a loan of its part for each layer.

    Autograd keeps the rows for backward, where training does not read them: it takes the moments that the kernel has
    kept. So they are used again in the next forward, and whoever writes them does so behind autograd's back, as the
    kernel does, through `writable`.
    """

    rows: Tensor  # (2 C,), the means and then the variances
    writable: Tensor  # the same memory
    before: Tensor | None  # (2 C,), the running statistics when the forward began, where the kernel averages
    pieces: Sequence[Tensor]  # the layers' parts: L of the means, L of the variances
    loans: Sequence[Loan]

    @property
    def ran(self) -> bool:
        """Whether any layer ran."""
        return any(loan.ran for loan in self.loans)


@dataclass(frozen=True)
class Rows:
    """What the layers of a group have reported of one forward, side by side."""

    mean: Tensor  # (C,): of the batch, or where the kernel computes the average, the new running mean
    var: Tensor  # (C,): *unbiased*, likewise
    count: Tensor  # (L,), floating: values per channel, 0 for a layer that did not run
    valid: Tensor | None  # (L,), bool: which layers' batches count; None if all do
    ran: Sequence[bool] = ()  # which layers ran, for listeners
    lent: Lent | None = None  # if these are the rows that were lent
    before: Tensor | None = None  # (2 C,), the running statistics before the batch, where they are known already


class _WideBatch(Batch):
    """The batches of all layers of a group. `count` and `step`, which few rules ask for, are made when one does."""

    _rows: Rows
    _group: Group

    @classmethod
    def of(cls, rows: Rows, group: Group) -> _WideBatch:
        """Return what the layers have reported, number by number a channel."""
        batch = cls.__new__(cls)
        valid = None if rows.valid is None else group.widened(rows.valid)
        batch.__dict__.update(mean=rows.mean, var=rows.var, valid=valid, _rows=rows, _group=group)
        return batch

    @cached_property
    def count(self) -> Tensor:
        return self._group.widened(self._rows.count)

    @cached_property
    def step(self) -> Tensor:
        return self._group.widened(self._group.next_steps())


class Group:
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
        self._sizes = [layer.num_features for layer in self.layers]
        self._channels = sum(self._sizes)
        like = running_mean(self.layers[0])
        self.dtype, self.device = like.dtype, like.device
        places, sizes = torch.arange(len(self._sizes), device="cpu"), torch.tensor(self._sizes, device="cpu")
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
        self._lent: list[Lent] = []

    def lend(self, ledger: Any, place: int) -> Lent:
        """Return a loan for each layer; those of one `place` use the same rows."""
        if place >= len(self._lent):
            lent = self._new_rows(ledger)
            if self._reuses:
                self._lent.append(lent)
        else:
            lent = self._lent[place]
            for loan in lent.loans:
                loan.renew()
            if lent.before is None:
                lent.writable.zero_()
            else:
                lent.writable.copy_(torch.cat(self._running(), out=lent.before))
        if not self.rules:
            for layer, loan in zip(self.layers, lent.loans, strict=False):
                loan.momentum = kernel_momentum(layer)
        return lent

    def _new_rows(self, ledger: Any) -> Lent:
        with torch.inference_mode(False):
            before = None if self.rules else torch.cat(self._running())
            if before is None:
                rows = torch.zeros(2 * self._channels, dtype=self.dtype, device=self.device)
            else:
                rows = before.clone()
        pieces = rows.split(self._sizes * 2)
        loans = [Loan(ledger, mean, var) for mean, var in zip(pieces, pieces[len(self.layers) :], strict=False)]
        return Lent(rows, rows.data, before, pieces, loans)

    def collect(self, lent: Lent) -> Rows:
        """Put the reports of one forward side by side."""
        loans = lent.loans
        own = any(loan.own_rows for loan in loans)
        both = torch.cat([*(loan.mean for loan in loans), *(loan.var for loan in loans)]) if own else lent.rows
        mean, var = self._halves(both)
        counts, ran = self.numbers([loan.count for loan in loans]), [loan.ran for loan in loans]
        # A layer that did not run keeps what it holds now.
        before = lent.before if all(ran) else None
        return Rows(mean, var, counts, self._valid(loans, ran, var), ran, None if own else lent, before)

    def settle(self, rows: Rows, batch: tuple[Tensor, Tensor] | None = None) -> None:
        """Update the running statistics of all layers.

        Args:
            rows: as from `collect`.
            batch: mean and *unbiased* variance of the batch, (C,) each, where the kernel made new running statistics of
                them in `rows`; for listeners.
        """
        both = self._statistics() if rows.before is None else rows.before
        before = self._halves(both)
        if self._tied is None:  # nobody listens to the private ones
            self._tell(rows, batch, before)
        if self.rules:
            new = torch.cat(self._updated(rows, before))
        else:
            new = torch.cat((rows.mean, rows.var)) if rows.lent is None else rows.lent.rows
        if rows.valid is not None:
            valid = rows.valid.index_select(0, self._owner_twice)
            out = None if rows.lent is None else rows.lent.writable
            new = torch.where(valid, new.to(self.dtype), both, out=out)
        self._write(new, rows.lent)
        self._count(rows.valid)

    def _updated(self, rows: Rows, before: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self._rule is None:
            return self._update_each(rows, before, self.next_steps())
        updated = self._rule.update(*before, _WideBatch.of(rows, self))
        self._check_state(self._rule)
        return updated

    def _write(self, new: Tensor, lent: Lent | None) -> None:
        if self._tied is not None:
            self._tied[0].copy_(new)
            return
        if lent is None:
            pieces: Sequence[Tensor] = new.split(self._sizes * 2)
        else:
            pieces = lent.pieces  # cut up already
            if new is not lent.rows and new is not lent.writable:
                lent.writable.copy_(new)
        copy_each(self._running(), list(pieces))

    def _count(self, valid: Tensor | None) -> None:
        if self._tied is not None:
            self._tied[1].add_(1 if valid is None else valid)
            return
        if valid is not None:
            self._ticks.copy_(valid)
        add_each(self._buffers("num_batches_tracked"), None if valid is None else self._tick_of_each)

    def finite(self, var: Tensor) -> Tensor:
        """Whether the moments of a layer's batch are finite, told by its variances: (L,) bool."""
        largest = torch.zeros(len(self.layers), dtype=var.dtype, device=self.device)
        return largest.scatter_reduce_(0, self._owner, var, "amax") < math.inf  # the maximum of a NaN is NaN

    def split(self, wide: Tensor) -> tuple[Tensor, ...]:
        """Cut a tensor of all channels into the layers' parts."""
        return tuple(wide.split(self._sizes))

    def widened(self, per_layer: Tensor) -> Tensor:
        """Repeat a number a layer, (L,), for each of its channels, (C,)."""
        return per_layer.index_select(0, self._owner)

    def numbers(self, values: Sequence[int | Tensor]) -> Tensor:
        """Return a number for each layer as a tensor, (L,), in the dtype of moments."""
        dtype = self._moments_dtype()
        if not any(isinstance(value, Tensor) for value in values):
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
        return 1 + (torch.stack(self._buffers("num_batches_tracked")) if self._tied is None else self._tied[1])

    def flags(self, values: Sequence[bool]) -> Tensor:
        """Return a truth for each layer as a tensor, (L,) bool."""
        return self._constant("flag", tuple(values), torch.bool)

    def is_tied(self) -> bool:
        """Whether the layers' averagings still are what this group took them for."""
        return self._rule is None or all(rule.__dict__.get("tie") is self for rule in self._own)

    def _moments_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _buffers(self, name: str) -> list[Tensor]:
        return [buffers_of(layer)[name] for layer in self.layers]  # type: ignore[misc]  # none of them is None

    def _running(self) -> list[Tensor]:
        return [*self._buffers("running_mean"), *self._buffers("running_var")]

    def _statistics(self) -> Tensor:
        """All running means and then all running variances: (2 C,)."""
        return torch.cat(self._running()) if self._tied is None else self._tied[0]

    def _halves(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Cut means and variances apart; in the dtype in which they are averaged, where that is not the kernel's."""
        mean, var = (both.to(self._moments_dtype()) if self.rules else both).split(self._channels)
        return mean, var

    def _valid(self, loans: Sequence[Loan], ran: Sequence[bool], var: Tensor) -> Tensor | None:
        """Which layers' batches count: those that ran, and were finite if anything else is to be skipped."""
        valid = self.finite(var) if self.skip_nonfinite else None
        if not all(ran):
            who = self.flags(ran)
            valid = who if valid is None else valid & who
        if any(loan.valid is not None for loan in loans):
            yes = self.flags([True])[0]
            own = torch.stack([yes if loan.valid is None else loan.valid for loan in loans])
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

    def _tell(self, rows: Rows, batch: tuple[Tensor, Tensor] | None, before: tuple[Tensor, Tensor]) -> None:
        listeners = {
            id(each): each for layer in self.layers if LISTENERS in layer.__dict__ for each in layer.__dict__[LISTENERS]
        }
        if listeners:
            count = rows.count if rows.valid is None else torch.where(rows.valid, rows.count, 0.0)
            # Copies: the rows are written once more.
            mean, var = (rows.mean.clone(), rows.var.clone()) if batch is None else batch
            settled = Settled(self.layers, mean, var, count, rows.ran, before)
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
                for own, part in zip(self.rules, wide.split(self._sizes, dim=-1), strict=True):
                    own.__dict__[name] = part
        for own in self._own:
            own.__dict__["tie"] = self
        return rule

    @torch.no_grad()
    def _tied_buffers(self) -> tuple[Tensor, Tensor]:
        """Lay the layers' buffers side by side, each layer's own a view: all statistics, (2 C,), and all counts."""
        both, steps = torch.cat(self._running()), torch.stack(self._buffers("num_batches_tracked"))
        pieces = both.split(self._sizes * 2)
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

    def _update_each(self, rows: Rows, before: tuple[Tensor, Tensor], steps: Tensor) -> tuple[Tensor, Tensor]:
        """The same for a rule that is not known to be elementwise: layer by layer, as it was written."""
        means, variances = [], []
        running = zip(*(self.split(each) for each in before), strict=True)
        # Copies: a rule may keep what it is given.
        means_of_batch, variances_of_batch = self.split(rows.mean.clone()), self.split(rows.var.clone())
        for place, (rule, (old_mean, old_var)) in enumerate(zip(self.rules, running, strict=True)):
            mean, var = means_of_batch[place], variances_of_batch[place]
            count = rows.count[place]
            valid = None if rows.valid is None else rows.valid[place]
            new_mean, new_var = rule.update(old_mean, old_var, Batch(mean, var, count, steps[place], valid))
            means.append(new_mean)
            variances.append(new_var)
        return torch.cat(means), torch.cat(variances)
