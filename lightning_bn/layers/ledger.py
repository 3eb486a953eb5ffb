"""The ledger of a model: what its layers are lent for one forward, settled for all of them together when the forward
ends."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging import Averaging, Batch
from lightning_bn.buffers import next_step
from lightning_bn.discovery import find_batch_norms, parts_called_by
from lightning_bn.layers.forwards import OutermostForward
from lightning_bn.layers.group import Group, Lent
from lightning_bn.layers.settlement import (
    ATTACHED,
    LISTENERS,
    LOAN,
    MERGED,
    OBSERVED,
    RESTING,
    Loan,
    Neighbours,
    advance,
    rule_of,
    rule_unless_kernel,
)
from lightning_bn.torch_internals import buffers_of

__all__ = ["Ledger", "release", "settle_together", "takes_loans"]

M = TypeVar("M", bound=nn.Module)

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
        layers = [layer.module for layer in find_batch_norms(module) if takes_loans(layer.module)]
        if layers and layers != [module]:
            Ledger(layers).attach(module)
    return model


def release(module: nn.Module) -> None:
    """Take away the ledger that `settle_together` gave to this very module."""
    for hook in list(module._forward_pre_hooks.values()):
        ledger = getattr(hook, "__self__", None)
        if type(ledger) is Ledger:
            ledger.detach()
    for layer in find_batch_norms(module):
        for ledger in list(layer.module.__dict__.get(RESTING, [])):
            if ledger.module is module:
                ledger.end_rest()


def takes_loans(layer: nn.Module) -> bool:
    """Whether the layer's forward knows of loans: this package's, and subclasses of other packages that were given an
    averaging."""
    return getattr(type(layer), "takes_loans", False) or ATTACHED in layer.__dict__ or OBSERVED in layer.__dict__


class Ledger(OutermostForward):
    """Lends to `layers` when the outermost forward of a module begins, and settles when it ends.

    Args:
        layers: which are below that module.
    """

    merges = False
    """Whether the statistics are those of several ranks. To a ledger that merges all others yield."""

    def __init__(self, layers: Iterable[_BatchNorm]) -> None:
        super().__init__()
        self.layers = [
            layer for layer in layers if layer.running_mean is not None and layer.num_batches_tracked is not None
        ]
        self.thread = 0
        self.has_rested = False
        self.later: list[tuple[_BatchNorm, Averaging, Batch]] = []
        """Batches that other threads have run through the layers meanwhile."""
        self._plans: dict[tuple[Any, ...], list[Group]] = {}
        self.rounds: list[list[tuple[Group, Lent]]] = []
        """What was lent in this forward and is not settled yet: of a layer that is called again, a round for each
        call."""
        self._groups: list[Group] = []

    def begin(self) -> bool:
        for layer in self.layers:
            loan: Loan | None = layer.__dict__.get(LOAN)
            if loan is not None:
                if loan.ledger.is_running():
                    if not loan.ledger.merges:  # for as long as the ranks meet, and no longer
                        self.rest()
                    return False  # a model around this one has lent already
                loan.ledger.abort()
        signature = self._signature()
        if not any(signature):
            return False
        self._groups = self._plan(signature)
        self.rounds = []
        self._lend()
        return True

    def rest(self) -> None:
        """Take the hooks away until a layer finds that nobody has lent it anything: most parts of a model never run but
        inside of it, and a hook costs at every step."""
        if not self.has_rested:
            self.has_rested = True
            self.detach()
            for layer in self.layers:
                layer.__dict__.setdefault(RESTING, Neighbours()).append(self)

    def wake(self) -> None:
        """Lend again from the next forward of the module on, and never rest again."""
        self.end_rest()
        if self.module is not None:
            self.attach(self.module)

    def end_rest(self) -> None:
        """Let the layers forget this ledger."""
        for layer in self.layers:
            at_rest = layer.__dict__.get(RESTING, [])
            if self in at_rest:
                at_rest.remove(self)
            if not at_rest:
                layer.__dict__.pop(RESTING, None)

    @torch.no_grad()
    def end(self) -> None:
        for lent in self.rounds.pop():
            _settle(*lent)

    def close(self) -> None:
        self.rounds = []
        for group in self._groups:
            for layer in group.layers:
                layer.__dict__.pop(LOAN, None)
        self._groups = []
        later, self.later = self.later, []
        for layer, averaging, batch in later:
            advance(layer, averaging, Batch(batch.mean, batch.var, batch.count, next_step(layer), batch.valid))

    def another(self, layer: _BatchNorm) -> Loan:
        """Begin a second round, for a layer that is called again; the first is settled now."""
        self.end()
        return self.lend_again(layer)

    def lend_again(self, layer: _BatchNorm) -> Loan:
        """Begin a second round, and return the loan of `layer`."""
        self._lend()
        loan: Loan = layer.__dict__[LOAN]
        return loan

    @torch.no_grad()
    def _lend(self) -> None:
        self.thread = threading.get_ident()
        round_: list[tuple[Group, Lent]] = []
        for group in self._groups:
            lent = group.lend(self, len(self.rounds))
            for layer, loan in zip(group.layers, lent.loans, strict=True):
                layer.__dict__[LOAN] = loan
            round_.append((group, lent))
        self.rounds.append(round_)

    def _signature(self) -> tuple[Any, ...]:
        """What decides which layers are settled together, for each of them; None for one whose statistics don't
        move."""
        merging = self.merges
        rule_told = rule_of if merging else rule_unless_kernel
        found: list[Any] = []
        for layer in self.layers:
            attributes, mean = layer.__dict__, buffers_of(layer)["running_mean"]
            moves = attributes["training"] and layer.track_running_stats
            if mean is None or not moves or (not merging and MERGED in attributes):
                found.append(None)
            else:
                found.append((rule_told(layer), mean.dtype, mean.device))
        return tuple(found)

    def _plan(self, signature: tuple[Any, ...]) -> list[Group]:
        groups = self._plans.get(signature)
        if groups is None or not all(group.is_tied() for group in groups):
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            groups = self._plans[signature] = self._grouped(signature)
        return groups

    def _grouped(self, signature: tuple[Any, ...]) -> list[Group]:
        members: dict[tuple[Any, ...], list[tuple[_BatchNorm, Averaging | None]]] = {}
        for layer, sign in zip(self.layers, signature, strict=True):
            if sign is not None:
                rule, dtype, device = sign
                key = (_kind(rule), dtype, device, getattr(layer, "skip_nonfinite", True))
                members.setdefault(key, []).append((layer, rule))
        return [
            Group(
                [layer for layer, _ in pairs], [rule for _, rule in pairs if rule is not None], skip_nonfinite=key[-1]
            )
            for key, pairs in members.items()
        ]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"later": [], "_plans": {}, "rounds": [], "_groups": []}


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


def _settle(group: Group, lent: Lent) -> None:
    if not lent.ran:
        return
    batch = None
    if not group.rules and any(LISTENERS in layer.__dict__ for layer in group.layers):
        moments = [loan.batch or (loan.mean, loan.var) for loan in lent.loans]
        batch = torch.cat([mean for mean, _ in moments]), torch.cat([var for _, var in moments])
    group.settle(group.collect(lent), batch)
