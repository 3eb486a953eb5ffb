"""Layers that follow one rule, as one wide layer of all their channels: whatever is one number a layer is given per
channel."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging import Averaging, Batch
from lightning_bn.layers.settlement import LISTENERS, Loan, Settled, kernel_momentum
from lightning_bn.torch_internals import add_each, buffers_of, copy_each

__all__ = ["Group", "Rows"]


@dataclass(frozen=True)
class Rows:
    """What the layers of a group have reported of one forward, side by side."""

    mean: Tensor  # (C,): of the batch, or where the kernel computes the average, the new running mean
    var: Tensor  # (C,): *unbiased*, likewise
    count: Tensor  # (L,), floating: values per channel, 0 for a layer that did not run
    valid: Tensor | None  # (L,), bool: which layers' batches count; None if all do
    ran: Sequence[bool] = ()  # which layers ran, for listeners
    lent: Tensor | None = None  # (2 C,), the means and variances that were lent, if these are they
    pieces: Sequence[Tensor] = ()  # the layers' parts of it


class Group:
    """Layers with one rule, dtype and device.

    Args:
        layers: at least one.
        rules: the averaging of each, all of the same settings; empty if the kernel computes the averages itself.
        skip_nonfinite: whether a batch that is not finite leaves no trace.
    """

    def __init__(self, layers: Sequence[_BatchNorm], rules: Sequence[Averaging], *, skip_nonfinite: bool) -> None:
        self.layers = list(layers)
        self.rules = list(rules)
        self.skip_nonfinite = skip_nonfinite
        self._sizes = [layer.num_features for layer in self.layers]
        self._channels = sum(self._sizes)
        like = self.layers[0].running_mean
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

    def lend(self, ledger: Any) -> tuple[Tensor, list[Loan]]:
        """Return the rows of all layers, (2 C,), and a loan of a part of them for each layer."""
        # New ones for each forward: autograd keeps them for backward.
        fresh = torch.zeros(2 * self._channels, dtype=self.dtype, device=self.device) if self.rules else None
        rows = self._statistics() if fresh is None else fresh
        pieces = rows.split(self._sizes * 2)
        momenta = [None] * len(self.layers) if self.rules else [kernel_momentum(layer) for layer in self.layers]
        loans = [
            Loan(ledger, mean, var, momentum)
            for mean, var, momentum in zip(pieces, pieces[len(self.layers) :], momenta, strict=False)
        ]
        return rows, loans

    def collect(self, rows: Tensor, loans: Sequence[Loan]) -> Rows:
        """Put the reports of one forward side by side; `rows` and `loans` are those of `lend`."""
        own = any(loan.own_rows for loan in loans)
        pieces = [*(loan.mean for loan in loans), *(loan.var for loan in loans)]
        both = torch.cat(pieces) if own else rows
        mean, var = (both.to(self._moments_dtype()) if self.rules else both).split(self._channels)
        count, valid, ran = self._counts(loans), self._valid(loans, var), [loan.ran for loan in loans]
        return Rows(mean, var, count, valid, ran) if own else Rows(mean, var, count, valid, ran, rows, pieces)

    def settle(self, rows: Rows, batch: tuple[Tensor, Tensor] | None = None) -> None:
        """Update the running statistics of all layers.

        Args:
            rows: as from `collect`.
            batch: mean and *unbiased* variance of the batch, (C,) each, where the kernel made new running statistics of
                them in `rows`; for listeners.
        """
        both = self._statistics()
        mean, var = (both.to(self._moments_dtype()) if self.rules else both).split(self._channels)
        self._tell(rows, batch, (mean, var))
        if not self.rules:
            new = rows.lent if rows.lent is not None else torch.cat((rows.mean, rows.var))
        else:
            new = torch.cat(self._updated(rows, (mean, var)))
        if rows.valid is not None:
            new = torch.where(rows.valid[self._owner_twice], new.to(self.dtype), both)
        self._write(new, rows)
        add_each(self._buffers("num_batches_tracked"), rows.valid)

    def _updated(self, rows: Rows, before: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        steps = torch.stack(self._buffers("num_batches_tracked")) + 1
        if self._rule is None:
            return self._update_each(rows, before, steps)
        valid = None if rows.valid is None else rows.valid[self._owner]
        batch = Batch(rows.mean, rows.var, rows.count[self._owner], steps[self._owner], valid)
        updated = self._rule.update(*before, batch)
        self._check_state(self._rule)
        return updated

    def _write(self, new: Tensor, rows: Rows) -> None:
        pieces: Sequence[Tensor] = rows.pieces
        if rows.lent is None:
            pieces = new.split(self._sizes * 2)
        elif new is not rows.lent:
            # Into the rows that were lent, which are cut up already. Autograd has saved them and must not notice, as it
            # does not when the kernel writes them: in training, backward takes the batch's moments and not these.
            rows.lent.data.copy_(new)
        copy_each([*self._buffers("running_mean"), *self._buffers("running_var")], list(pieces))

    def finite(self, var: Tensor) -> Tensor:
        """Whether the moments of a layer's batch are finite, told by its variances: (L,) bool."""
        return (
            torch.zeros(len(self.layers), dtype=torch.float32, device=self.device).index_add_(
                0, self._owner, (~(var < math.inf)).float()
            )
            == 0
        )

    def split(self, wide: Tensor) -> tuple[Tensor, ...]:
        """Cut a tensor of all channels into the layers' parts."""
        return tuple(wide.split(self._sizes))

    def widened(self, per_layer: Tensor) -> Tensor:
        """Repeat a number a layer, (L,), for each of its channels, (C,)."""
        return per_layer[self._owner]

    def is_tied(self) -> bool:
        """Whether the layers' averagings still are what this group took them for."""
        return self._rule is None or all(rule.__dict__.get("tie") is self for rule in self._own)

    def _moments_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _buffers(self, name: str) -> list[Tensor]:
        return [buffers_of(layer)[name] for layer in self.layers]  # type: ignore[misc]  # none of them is None

    def _statistics(self) -> Tensor:
        """All running means and then all running variances: (2 C,)."""
        return torch.cat([*self._buffers("running_mean"), *self._buffers("running_var")])

    def _counts(self, loans: Sequence[Loan]) -> Tensor:
        counts, dtype = [loan.count for loan in loans], self._moments_dtype()
        if any(isinstance(count, Tensor) for count in counts):
            tensors = [
                c.to(dtype) if isinstance(c, Tensor) else torch.full((), c, dtype=dtype, device=self.device)
                for c in counts
            ]
            return torch.stack([count.reshape(()) for count in tensors])
        return self._constant("count", tuple(counts), dtype)

    def _valid(self, loans: Sequence[Loan], var: Tensor) -> Tensor | None:
        """Which layers' batches count: those that ran, and were finite if anything else is to be skipped."""
        valid = self.finite(var) if self.skip_nonfinite else None
        if not all(loan.ran for loan in loans):
            ran = self._constant("ran", tuple(loan.ran for loan in loans), torch.bool)
            valid = ran if valid is None else valid & ran
        if any(loan.valid is not None for loan in loans):
            yes = self._constant("ran", (True,), torch.bool)[0]
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
        for own, size in zip(self.rules, self._sizes, strict=True):
            own.upgrade(size)
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

    def _check_state(self, rule: Averaging) -> None:
        for name, tensor in self._state.items():
            if getattr(rule, name) is not tensor:
                raise TypeError(
                    f"{type(rule).__name__}.update assigns self.{name}, of which each layer holds a part. Write it in place: "
                    f"batch.write(self.{name}, value)."
                )

    def _update_each(self, rows: Rows, before: tuple[Tensor, Tensor], steps: Tensor) -> tuple[Tensor, Tensor]:
        """The same for a rule that is not known to be elementwise: layer by layer, as it was written."""
        means, variances = [], []
        running = zip(*(self.split(each) for each in before), strict=True)
        for place, (rule, (old_mean, old_var)) in enumerate(zip(self.rules, running, strict=True)):
            mean, var = self.split(rows.mean)[place], self.split(rows.var)[place]
            count = rows.count[place]
            valid = None if rows.valid is None else rows.valid[place]
            new_mean, new_var = rule.update(old_mean, old_var, Batch(mean, var, count, steps[place], valid))
            means.append(new_mean)
            variances.append(new_var)
        return torch.cat(means), torch.cat(variances)
