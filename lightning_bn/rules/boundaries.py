"""BN107, and what it is judged by: statistics that move while no batch runs, seen by the versions of buffers, which the
host keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bn.rules.finding import Fix
from lightning_bn.rules.modes import as_recalibration
from lightning_bn.rules.rule import Occasion, Rule, Seen
from lightning_bn.rules.snapshots import unsure, versions, writes
from lightning_bn.torch_internals import buffers_of, parameters_of


class _State(NamedTuple):
    """How often each layer's statistics, mean and weight were written, which tensor the mean is, and the mode."""

    counts: list[int]
    means: list[int]
    weights: list[int]
    tensors: list[Tensor | None]
    modes: list[bool]

    def same_mean(self, other: _State, index: int) -> bool:
        return self.means[index] == other.means[index] and self.tensors[index] is other.tensors[index]


class MovedBetweenBatches(Rule):
    """Compares the buffers at the end of a batch, or of an evaluation, with those at the next beginning.

    A forward counts its batch. So does whoever copies a state in, such as a checkpoint or averaged weights; that also
    writes the mean where autograd sees it, which torch's kernel does not. The layers of this package, and those with a
    forward of their own, write both; then a state was copied if the weight was written too, or if the layer does not
    learn and is in eval mode; and the count of this package's layers must have risen.
    """

    code = "BN107"
    title = "a forward between two batches moved the running statistics"
    why = "they become a mixture of training batches and of what else was run in training mode."

    def begin(self, at: Occasion) -> None:
        self._modules = [layer.module for layer in at.layers]
        own = (
            index
            for index, layer in enumerate(at.layers)
            if layer.tracks
            and (getattr(layer.module, "averaging", None) or type(layer.module).__module__ == "lightning_bn")
        )
        self._own = {index: place for place, index in enumerate(own)}
        self._unsure = unsure(at.layers)
        self._left: _State | None = None
        self._counts: Tensor | None = None

    def end_batch(self, at: Occasion) -> None:
        self._left = self._state()
        self._counts = self._count() if self._own else None

    def begin_batch(self, at: Occasion) -> Iterator[Seen]:
        return self._look(at, f"before batch {at.index}")

    def begin_evaluation(self, at: Occasion) -> Iterator[Seen]:
        return self._look(at, f"before {at.stage}", before_evaluation=True)

    def end_training(self, at: Occasion) -> Iterator[Seen]:
        return self._look(at, "after the last batch")

    def _look(self, at: Occasion, when: str, *, before_evaluation: bool = False) -> Iterator[Seen]:
        left, self._left = self._left, None
        counts = [] if left is None else writes(self._modules, self._unsure)
        if left is None or counts == left.counts:  # as between almost all batches
            return
        now = self._state()
        moved = [index for index, (one, other) in enumerate(zip(counts, left.counts, strict=True)) if one != other]
        layers = at.named(index for index in moved if self._by_forward(index, left, now, index in at.held))
        if layers and before_evaluation:  # it may be a recalibration
            yield as_recalibration(layers, when)
        elif layers:
            target = at.around(layers)
            event = "the running statistics moved: in a hook, a data set or a callback the model ran in training mode."
            note = f"or {target}.eval() before and {target}.train() after it"
            fix = Fix(f"with paused_statistics({target}):", "around that forward", note)
            yield Seen(layers, f"{when} {event}", fix=fix)

    def _by_forward(self, index: int, left: _State, now: _State, held: bool) -> bool:
        if left.tensors[index] is not now.tensors[index] or self._modules[index].momentum == 0:
            return False
        if index not in self._own and index not in self._unsure:
            return left.same_mean(now, index)
        idle = held and not left.modes[index] and not now.modes[index]
        if left.weights[index] != now.weights[index] or idle:
            return False
        if index not in self._own or self._counts is None:
            return True
        place, count = self._own[index], self._count()
        return bool((count[place] > self._counts.to(count.device)[place]).item())

    def _state(self) -> _State:
        all_buffers = [buffers_of(module) for module in self._modules]
        return _State(
            writes(self._modules, self._unsure),
            versions(all_buffers, "running_mean"),
            versions([parameters_of(module) for module in self._modules], "weight"),
            [buffers.get("running_mean") for buffers in all_buffers],
            [module.training for module in self._modules],
        )

    def _count(self) -> Tensor:
        """The batches counted by the layers of this package: does not wait for the device."""
        counts = [buffers_of(self._modules[index])["num_batches_tracked"] for index in self._own]
        device = counts[0].device if counts[0] is not None else None
        return torch.stack([count.to(device) for count in counts if count is not None])
