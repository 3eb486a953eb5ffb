"""BN107, and what it is judged by: statistics that move while no batch runs, seen by the versions of buffers, which the
host keeps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bn.discovery import BatchNormLayer
from lightning_bn.rules.finding import Fix
from lightning_bn.rules.fixes import RECALIBRATION
from lightning_bn.rules.rule import Moment, Rule, Seen
from lightning_bn.rules.versions import unsure, versions, writes
from lightning_bn.torch_internals import buffers_of, parameters_of


class MovedBetweenBatches(Rule):
    code = "BN107"
    title = "a forward between two batches moved the running statistics"
    why = "they become a mixture of training batches and of what else was run in training mode."

    def __init__(self) -> None:
        self._boundaries = Boundaries(())

    def begin(self, at: Moment) -> None:
        self._boundaries = Boundaries(at.layers)

    def end_batch(self, at: Moment) -> None:
        self._boundaries.leave()

    def begin_batch(self, at: Moment) -> Iterator[Seen]:
        return self._look(at, f"before batch {at.index}")

    def begin_evaluation(self, at: Moment) -> Iterator[Seen]:
        return self._look(at, f"before {at.stage}", before_evaluation=True)

    def end_training(self, at: Moment) -> Iterator[Seen]:
        return self._look(at, "after the last batch")

    def _look(self, at: Moment, when: str, *, before_evaluation: bool = False) -> Iterator[Seen]:
        layers = at.named(self._boundaries.back(at.held))
        if layers and before_evaluation:  # it may be a recalibration
            yield Seen(
                layers,
                f"{when} the model ran in training mode, as a recalibration of the statistics does.",
                "info",
                RECALIBRATION,
                "with training batches this is right; the callback does it by pooled moments, and puts all else back.",
            )
        elif layers:
            modules = at.tops(layers)
            target = at.path(modules[0] if len(modules) == 1 else "")
            event = "the running statistics moved: in a hook, a data set or a callback the model ran in training mode."
            note = f"or {target}.eval() before and {target}.train() after it"
            fix = Fix(f"with paused_statistics({target}):", "around that forward", note)
            yield Seen(layers, f"{when} {event}", fix=fix)


class _State(NamedTuple):
    """How often each layer's statistics, mean and weight were written, which tensor the mean is, and the mode."""

    counts: list[int]
    means: list[int]
    weights: list[int]
    tensors: list[Tensor | None]
    modes: list[bool]

    def same_mean(self, other: _State, index: int) -> bool:
        return self.means[index] == other.means[index] and self.tensors[index] is other.tensors[index]


class Boundaries:
    """Compares the buffers at the end of a batch, or of an evaluation, with those at the next beginning.

    A forward counts its batch. So does whoever copies a state in, such as a checkpoint or averaged weights; that also
    writes the mean where autograd sees it, which torch's kernel does not. The layers of this package, and those with a
    forward of their own, write both; then a state was copied if the weight was written too, or if the layer does not
    learn and is in eval mode; and the count of this package's layers must have risen.

    Args:
        layers: the model's batch-norm layers.
    """

    def __init__(self, layers: Sequence[BatchNormLayer]) -> None:
        self._modules = [layer.module for layer in layers]
        self._left: _State | None = None
        own = (
            index
            for index, layer in enumerate(layers)
            if layer.tracks
            and (getattr(layer.module, "averaging", None) or type(layer.module).__module__ == "lightning_bn")
        )
        self._own = {index: place for place, index in enumerate(own)}
        self._unsure = unsure(layers)
        self._counts: Tensor | None = None

    def leave(self) -> None:
        """A batch or an evaluation ends."""
        self._left = self._state()
        self._counts = self._count() if self._own else None

    def back(self, held: Collection[int] = ()) -> list[int]:
        """The next batch or evaluation begins: return the indices of the layers that a forward moved since `leave`.

        Args:
            held: indices of the layers that do not learn.
        """
        left, self._left = self._left, None
        if left is None:
            return []
        counts = writes(self._modules, self._unsure)
        if counts == left.counts:  # as between almost all batches
            return []
        now = self._state()
        moved = [index for index, (one, other) in enumerate(zip(counts, left.counts, strict=True)) if one != other]
        return [index for index in moved if self._by_forward(index, left, now, index in held)]

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
