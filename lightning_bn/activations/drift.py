"""How far the batches have moved from the running statistics, read from the buffers alone: no hook, no look at an
activation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter, methodcaller
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.activations.formulas import distance, summarise_drift
from lightning_bn.activations.pool_to_host import Array, Mask, joined, silent_numbers, to_host
from lightning_bn.averaging import Averaging, Cumulative, Exponential
from lightning_bn.error_boundary import UNBOUNDED, ErrorBoundary, guarded
from lightning_bn.layers.deferred import can_defer
from lightning_bn.layers.settlement import Settled, listening, rule_of
from lightning_bn.set_in_use import OtherSets
from lightning_bn.torch_internals import buffer_of_each

# Five times the memory of torch's own average, in which weights move fastest.
YOUNG = 50
DEFAULT_MEMORY = 0.9

_MODULES, _AVERAGING = itemgetter("_modules"), methodcaller("get", "averaging")
_MOMENTUM, _WIDTH, _SIZE = map(attrgetter, ("momentum", "num_features", "itemsize"))


@dataclass(frozen=True)
class Drift:
    """What a `DriftMeter` found of L layers."""

    values: Array  # (L, 4), in the order of `registry.DRIFT_STATISTICS`; NaN where nothing tells
    # (L, 4), what of it the 0/1 start leaves unexplained: against the statistics less that start; 0 in a young layer
    settled: Array
    ran: Mask  # (L,): whether there were batches
    nonfinite: (
        Array  # (L,), channels whose running statistics were NaN or infinite before the batches, or the evaluation
    )
    # (L,), share of the channels whose batch variance is below eps, so that the norm divides by nothing but eps
    below_eps: Array = field(default_factory=lambda: np.empty(0))
    # (L,), whether a layer has seen so few batches that its weights still move fast
    young: Mask = field(default_factory=lambda: np.empty(0, dtype=bool))
    shift: Array = field(default_factory=lambda: np.empty(0))  # (S,), of each channel, as `distance` has it
    log_ratio: Array = field(default_factory=lambda: np.empty(0))  # (S,), likewise


LayersByAverage: TypeAlias = list[tuple[Averaging, list[int]]]  # each with the indices of its layers


class Readout(NamedTuple):
    """What a `DriftMeter` keeps of a sample until it is evaluated."""

    tensors: list[Tensor]
    rules: LayersByAverage
    handed: list[list[int]]  # layers of each pair of the further tensors, whose batches are known


_NONE = Drift(np.empty((0, 4)), np.empty((0, 4)), np.empty(0, dtype=bool), np.empty(0))


class DriftMeter:
    """Drift of many batch-norm layers at once, between `start` and `readout`, with as few kernels as for one.

    By an exponential average of momentum m, one batch is ``before + (after - before) / m``; an averaging says how much
    its newest batches weigh (`Averaging.newest_weight`). Where it can't, as a window can't, a layer of this package
    tells of its batches when it settles them; of any other, somebody hands them in. Drift is measured against the
    statistics *before* those batches. On the device there are a handful of copies; the arithmetic is the host's.

    Args:
        layers: which keep running statistics.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.BatchNorm1d(1, eps=1e-9)
        >>> meter = DriftMeter([layer])
        >>> meter.start()
        >>> _ = layer(torch.tensor([[2.0], [4.0]]))  # mean 3, unbiased variance 2; the running ones are 0 and 1
        >>> meter.measure().values.round(4)[0].tolist()  # rms and max of the shift, rms and max of log(2)
        [3.0, 3.0, 0.6931, 0.6931]
    """

    def __init__(self, layers: Sequence[_BatchNorm], boundary: ErrorBoundary = UNBOUNDED) -> None:
        self._boundary = boundary
        self.layers = list(layers)
        self._before: list[Tensor] | None = None
        self._handed: list[dict[int, tuple[Tensor, Tensor]]] = []  # each layer's first batch since `start`, second, ...
        self._heard: dict[_BatchNorm, int] = {}  # the layers that tell of their batches
        self._end: Callable[[], None] = _nothing
        self._sets = OtherSets(self.layers)
        self._rules: LayersByAverage = []  # of `start` or `statistics`, and their layers
        self._tells: dict[object, bool] = {}  # by rule, whether the statistics tell what the newest batch was like
        self._widths = np.array([layer.num_features for layer in self.layers], dtype=np.int64)
        self._starts = np.cumsum(self._widths) - self._widths
        self._eps = np.repeat([layer.eps for layer in self.layers], self._widths) if self.layers else np.zeros(0)
        self._from_zero_one = np.ones(len(self.layers), dtype=bool)

    def unreadable(self) -> list[int]:
        """Return the indices of the layers of which nothing tells what their batches were like: torch's, if they are
        kept in 16 bits."""
        return [index for index in self._silent(self._by_rule()) if not can_defer(self.layers[index])]

    def is_outgrown(self) -> bool:
        """Whether a layer has another number of channels by now, as after structured pruning."""
        widths: list[int] = self._widths.tolist()
        return list(map(_WIDTH, self.layers)) != widths

    def _by_rule(self) -> LayersByAverage:
        """Layers of one rule together: for a whole model it is a handful of calls, and not as many for each layer."""
        averagings = set(map(_AVERAGING, map(_MODULES, map(vars, self.layers))))
        if averagings == {None} and len(set(map(_MOMENTUM, self.layers))) == 1:
            return [(rule_of(self.layers[0]), list(range(len(self.layers))))]  # torch's layers, as they mostly are
        found: dict[object, tuple[Averaging, list[int]]] = {}
        newest: Averaging | None = None
        for index, layer in enumerate(self.layers):
            rule = rule_of(layer)
            if rule is not newest:  # plain layers share one
                newest, (_, indices) = rule, found.setdefault(_key(rule), (rule, []))
            indices.append(index)
        return list(found.values())

    def _silent(self, rules: LayersByAverage) -> list[int]:
        """The layers whose buffers don't tell, as their average is a window, pooled or a user's own, or is kept in 16
        bits."""
        sizes = list(map(_SIZE, buffer_of_each(self.layers, "running_mean")))
        found = [index for index, size in enumerate(sizes) if size < 4] if min(sizes, default=4) < 4 else []
        for rule, indices in rules:
            key = _key(rule)
            if key not in self._tells:
                one = torch.ones((), dtype=torch.int64, device="cpu")
                self._tells[key] = rule.newest_weight(one, one) is not None
            if not self._tells[key]:
                found += indices
        return sorted(set(found))

    @torch.no_grad()
    def start(self) -> None:
        """Remember the running statistics as they are now, and listen to the layers whose buffers don't tell, until
        `readout` or `close`."""
        self.close()
        self._handed = []
        self._sets.rest()
        if self.layers:
            self._before = self._buffers()
        self._rules = self._by_rule()
        self._heard = {
            self.layers[index]: index for index in self._silent(self._rules) if can_defer(self.layers[index])
        }
        if self._heard:
            self._end = listening(list(self._heard), self._hear)

    def close(self) -> None:
        """Listen no more."""
        self._end()
        self._end = _nothing

    @guarded
    def _hear(self, settled: Settled) -> None:
        widths = [layer.num_features for layer in settled.layers]
        batches = zip(settled.layers, settled.ran, settled.mean.split(widths), settled.var.split(widths), strict=True)
        self.hand_in(
            (self._heard[layer], mean, var)
            for layer, ran, mean, var in batches
            if ran and layer in self._heard and self._sets.of(layer) is None
        )

    def hand_in(self, batches: Iterable[tuple[int, Tensor, Tensor]]) -> None:
        """Take note of what a batch was like in layers; where that is known it is not read from the buffers.

        Args:
            batches: index of the layer, the batch's mean (C,) and its *unbiased* variance (C,). Of several batches of a
                layer since `start` it is their mean.
        """
        for index, mean, var in batches:
            free = next((each for each in self._handed if index not in each), None)
            if free is None:
                self._handed.append(free := {})
            free[index] = mean, var

    @torch.no_grad()
    def readout(self) -> Readout:
        """Return what `evaluate` needs, still on the device, for one transfer.

        Raises:
            RuntimeError: `start` was not called.
        """
        if not self.layers:
            return Readout([], [], [])
        if self._before is None:
            raise RuntimeError(
                "DriftMeter.measure() without start(): call start() before the batch, measure() after it."
            )
        after = self._buffers()  # batches that are on their way from other ranks arrive, and are heard of
        self.close()
        handed = [joined([moments[part] for moments in each.values()]) for each in self._handed for part in (0, 1)]
        return Readout([*self._before, *after, *handed], self._rules, [list(each) for each in self._handed])

    def measure(self) -> Drift:
        """Return the drift since `start`: `readout`, a transfer, `evaluate`."""
        readout = self.readout()
        return self.evaluate([readout._replace(tensors=to_host(readout.tensors))])[0]

    @silent_numbers()
    def evaluate(self, readouts: Sequence[Readout]) -> list[Drift]:
        """Return the drift of all layers between `start` and `readout`, of T samples in their order, which together
        cost hardly more than one.

        NaN for a layer that took no batch in, or whose buffers don't tell and for which nothing was handed in. Of
        several batches since then it is their mean.

        Args:
            readouts: with their tensors on the host, of one shape; their rules are the same, and so is what was handed
                in of which layers.
        """
        if not self.layers:
            return [_NONE] * len(readouts)
        first = readouts[0]
        host = [torch.stack(each) for each in zip(*(each.tensors for each in readouts), strict=True)]
        before, after, tracked, now = _moments(host[0]), _moments(host[2]), host[1], host[3]
        batches = now - tracked
        parts = torch.stack((now, tracked)), torch.stack((batches, tracked))
        weight, whole = self._newest_weight(first.rules, *parts)
        weight = np.repeat(weight, self._widths, axis=-1)
        batch = self._with_handed(before + (after - before) / weight, first.handed, host[4:])
        ran = (batches > 0).numpy()
        share, begins = self._share_of_start(before, tracked, whole)
        values, settled, channels = self._against_both(batch, before, share)
        values[~ran] = settled[~ran] = np.nan
        settled[_is_young(begins, tracked, share) & ran] = 0
        # What follows from the buffers is known to their rounding, no better.
        known = (before[1] * 2.0**-20 < weight * self._eps) | np.isnan(weight)
        below_eps = np.where(ran, self._below_eps(batch[1], known), np.nan)
        found = (values, settled, ran, self._nonfinite(before), below_eps, (tracked < YOUNG).numpy(), *channels)
        return [Drift(*each) for each in zip(*found, strict=True)]

    @torch.no_grad()
    def statistics(self) -> list[Tensor]:
        """Return the running statistics as they are, still on the device, for one transfer and `against`."""
        self._rules = self._by_rule()
        return self._buffers() if self.layers else []

    @silent_numbers()
    def against(self, host: Sequence[Tensor], inputs: Mapping[int, tuple[Array, Array]]) -> Drift:
        """Return the drift of what an evaluation gives the layers, against the running statistics that it uses.

        The 0/1 start explains it only as far as torch's own average would hold it too: a slower average is read while
        it has not arrived.

        Args:
            host: what `statistics` returned.
            inputs: by index of the layer, mean and *unbiased* variance of its input per channel, (C,) each.
        """
        if not self.layers:
            return _NONE
        running, counts = _moments(host[0]), host[1]
        nothing = [np.full(width, np.nan) for width in self._widths]
        batch = np.stack(
            [
                np.concatenate([inputs[index][part] if index in inputs else none for index, none in enumerate(nothing)])
                for part in (0, 1)
            ]
        )
        share, begins = self._share_of_start(running, counts, self._newest_weight(self._rules, counts, counts))
        values, settled, channels = self._against_both(batch, running, share)
        steps = counts.numpy()
        young = _is_young(begins, counts, share) & ((steps > 0) | (steps == 0).all())
        settled = np.where(young[:, None], 0.0, np.where(_is_quick(counts, share)[:, None], settled, values))
        ran = np.isin(np.arange(len(self.layers)), list(inputs))
        below_eps = np.where(ran, self._below_eps(batch[1], np.True_), np.nan)
        return Drift(values, settled, ran, self._nonfinite(running), below_eps, (counts < YOUNG).numpy(), *channels)

    def _against_both(self, batch: Array, running: Array, share: Array) -> tuple[Array, Array, tuple[Array, Array]]:
        """The drift of a batch, (2, ..., S), against the running statistics and against these less their start,
        (..., L, 4) each; and by channel that against the running statistics."""
        both = np.stack((running, self._less_start(running, share)), axis=1)  # (2, 2, ..., S)
        shift, log_ratio = distance(batch[0], batch[1], both[0], both[1], self._eps)
        values, settled = summarise_drift(shift, log_ratio, self._widths)
        return values, settled, (shift[0], log_ratio[0])

    def _total(self, channels: Mask | np.bool_) -> Array:
        """How many channels of each layer are so: (..., L)."""
        found: Array = np.add.reduceat(channels, self._starts, axis=-1, dtype=np.float64)
        return found

    def _below_eps(self, var: Array, known: Mask | np.bool_) -> Array:
        return self._total((var < self._eps) & known) / self._widths

    def _nonfinite(self, running: Array) -> Array:
        return self._total(~np.isfinite(running).all(axis=0))

    def _buffers(self) -> list[Tensor]:
        """Running means and then variances of all layers in one flat vector, (2 S,), and the numbers of batches they
        took in, (L,)."""
        mean, var, counts = (
            buffer_of_each(self.layers, name) for name in ("running_mean", "running_var", "num_batches_tracked")
        )
        return [joined(mean + var), joined(counts)]

    def _share_of_start(self, running: Array, counts: Tensor, whole: Array) -> tuple[Array, Mask]:
        """How much of the running statistics is still the 0/1 that they began with, and which began so: (..., L).

        Args:
            running: (2, ..., S).
            counts: (..., L), batches in them.
            whole: (..., L), how much these weigh, NaN where that is not known.
        """
        begins = self._look_at_start(running, counts)
        weight = 1 - whole
        # What does not tell its weights has no start in it, once it has a batch.
        weight = np.where((counts == 0).numpy(), 1.0, np.nan_to_num(weight, nan=0.0))
        return np.where(begins, weight, 0.0), begins

    def _less_start(self, running: Array, shares: Array) -> Array:
        """The running statistics as they would be without the share of 0 and 1 that they began with: (2, ..., S)."""
        share = np.repeat(shares, self._widths, axis=-1)
        rest = np.where(share < 1, 1 - share, np.nan)
        return np.stack((running[0] / rest, np.maximum((running[1] - share) / rest, 0.0)))

    def _look_at_start(self, running: Array, counts: Tensor) -> Mask:
        """Take note of layers that have taken no batch in and hold other statistics than 0/1, as pretrained ones may;
        return which began with 0/1, as it is known at each sample: (..., L)."""
        new: Mask = (counts == 0).numpy()
        if not new.any():
            return np.broadcast_to(self._from_zero_one, new.shape)
        is_other = self._total((running[0] != 0) | (running[1] != 1)) > 0
        found = np.empty_like(new)
        for place in np.ndindex(new.shape[:-1]):
            self._from_zero_one = np.where(new[place], ~is_other[place], self._from_zero_one)
            found[place] = self._from_zero_one
        return found

    @staticmethod
    def _newest_weight(rules: LayersByAverage, step: Tensor, batches: Tensor) -> Array:
        """Weight of the newest batches in each layer's statistics: (..., L), NaN where the layer's rule can't tell."""
        if len(rules) == 1:  # as in most models: nothing to pick out
            weight = rules[0][0].newest_weight(step, batches)
            return np.full(step.shape, np.nan) if weight is None else weight.double().numpy()
        weights = torch.full(step.shape, torch.nan, dtype=torch.float64)
        for rule, indices in rules:
            weight = rule.newest_weight(step[..., indices], batches[..., indices])
            if weight is not None:
                weights[..., indices] = weight.double()
        return weights.numpy()

    def _with_handed(self, batch: Array, handed: Sequence[list[int]], host: Sequence[Tensor]) -> Array:
        """The same, (2, T, S), with what was handed in, in the places of those layers; a batch that was not finite is
        left out."""
        if not handed:
            return batch
        known = np.full((len(handed), *batch.shape), np.nan)
        for number, indices in enumerate(handed):
            places = np.concatenate([self._starts[each] + np.arange(self._widths[each]) for each in indices])
            for part in (0, 1):
                known[number, part][:, places] = host[2 * number + part].double().numpy()
        finite = np.isfinite(known[:, 1:])
        mean = np.where(finite, known, 0.0).sum(0) / finite.sum(0)
        return np.where(np.isnan(mean), batch, mean)


def _is_young(begins: Mask, counts: Tensor, share: Array) -> Mask:
    """Which layers began with 0/1 and have seen so few batches that torch's own average would be in its start too;
    their weights move fast."""
    young: Mask = begins & (counts.numpy() < YOUNG) & _is_quick(counts, share)
    return young


def _is_quick(counts: Tensor, share: Array) -> Mask:
    """Which layers have forgotten their start as well as torch's own average would have."""
    quick: Mask = share <= DEFAULT_MEMORY ** counts.numpy() + 1e-6
    return quick


def _moments(flat: Tensor) -> Array:
    """Means and variances of what is laid out as in `DriftMeter._buffers`: (2, ..., S)."""
    both: Array = flat.double().numpy().reshape(*flat.shape[:-1], 2, -1)
    return np.moveaxis(both, -2, 0)


def _key(rule: Averaging) -> object:
    """What rules have in common that weigh their newest batches alike; of a user's own, its repr need not tell."""
    return (type(rule), rule.extra_repr()) if type(rule) in (Exponential, Cumulative) else rule


def _nothing() -> None:
    """What ends listening before it has begun."""
