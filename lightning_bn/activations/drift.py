"""How far the batches have moved from the running statistics, read from the buffers alone: no hook, no look at an
activation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging import Averaging, Cumulative, Exponential
from lightning_bn.layers.ledger import takes_loans
from lightning_bn.layers.settlement import Settled, listening, rule_of
from lightning_bn.moments import drift, wide_dtype

__all__ = ["DriftMeter", "summarise_drift"]


def summarise_drift(shift: Tensor, log_ratio: Tensor, width: Tensor) -> Tensor:
    """Return the root mean square and the greatest absolute value over channels of both: (L, 4), in the order of
    `DRIFT_STATISTICS`.

    Args:
        shift: (L, C), zero where a layer has fewer channels than C.
        log_ratio: (L, C), likewise.
        width: (L,), channels of each layer.
    """
    columns = []
    for values in (shift, log_ratio):
        columns += [(values.square().sum(1) / width).sqrt(), values.abs().amax(1)]
    return torch.stack(columns, dim=1)


class DriftMeter:
    """Drift of many batch-norm layers at once, between `start` and `measure`, with as few kernels as for one.

    What the batches in between were like follows from how the running statistics moved: by an exponential average of
    momentum m, one batch is ``before + (after - before) / m``. An averaging says how much its newest batches weigh
    (`Averaging.newest_weight`). Where it can't, as a window can't, a layer of this package tells of its batches when it
    settles them; of any other, somebody hands them in. Drift is measured against the statistics *before* those batches:
    what an evaluation at that moment would have used.

    Args:
        layers: which keep running statistics.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.BatchNorm1d(1, eps=1e-9)
        >>> meter = DriftMeter([layer])
        >>> meter.start()
        >>> _ = layer(torch.tensor([[2.0], [4.0]]))  # mean 3, unbiased variance 2; the running ones are 0 and 1
        >>> [round(value, 4) for value in meter.measure()[0].tolist()]  # rms and max of the shift, rms and max of log(2)
        [3.0, 3.0, 0.6931, 0.6931]
    """

    def __init__(self, layers: Sequence[_BatchNorm]) -> None:
        self.layers = list(layers)
        self._before: tuple[Tensor, Tensor, Tensor] | None = None
        self._handed: list[
            dict[int, tuple[Tensor, Tensor]]
        ] = []  # each layer's first batch since `start`, each one's second, ...
        self._heard: dict[_BatchNorm, int] = {}  # the layers that tell of their batches
        self._end: Callable[[], None] = _nothing
        self._tells: dict[
            object, bool
        ] = {}  # by rule, whether the running statistics tell what the newest batch was like
        if not self.layers:
            return
        self._device = self.layers[0].running_mean.device
        self._dtype = wide_dtype(self._device)
        widths = [layer.num_features for layer in self.layers]
        self._widths = torch.tensor(widths, device=self._device)
        starts = self._widths.cumsum(0) - self._widths
        places = torch.arange(max(widths), device=self._device)
        # Row l are the places of layer l's channels in the flat vector; past its width the place of the zero behind the
        # last.
        self._places = torch.where(places < self._widths[:, None], starts[:, None] + places, sum(widths))
        self._eps = self._per_channel(
            torch.tensor([layer.eps for layer in self.layers], dtype=self._dtype, device=self._device)
        )
        self._groups: dict[tuple[int, ...], Tensor] = {}

    def unreadable(self) -> list[int]:
        """Return the indices of the layers of which nothing tells what their batches were like: torch's, if they are
        kept in 16 bits."""
        return [index for index in self._silent() if not takes_loans(self.layers[index])]

    def _silent(self) -> list[int]:
        """The layers whose buffers don't tell, as their average is a window, pooled or a user's own, or is kept in 16
        bits."""
        found = []
        for index, layer in enumerate(self.layers):
            rule = rule_of(layer)
            key = _key(rule)
            if key not in self._tells:
                one = torch.ones((), dtype=torch.int64, device="cpu")
                self._tells[key] = rule.newest_weight(one, one) is not None
            if torch.finfo(layer.running_mean.dtype).bits < 32 or not self._tells[key]:
                found.append(index)
        return found

    @torch.no_grad()
    def start(self) -> None:
        """Remember the running statistics as they are now, and listen to the layers whose buffers don't tell, until
        `measure` or `close`."""
        self.close()
        self._handed = []
        if self.layers:
            self._before = self._buffers()
        self._heard = {self.layers[index]: index for index in self._silent() if takes_loans(self.layers[index])}
        self._end = listening(list(self._heard), self._hear)

    def close(self) -> None:
        """Listen no more."""
        self._end()
        self._end = _nothing

    def _hear(self, settled: Settled) -> None:
        widths = [layer.num_features for layer in settled.layers]
        batches = zip(settled.layers, settled.ran, settled.mean.split(widths), settled.var.split(widths), strict=True)
        self.hand_in(
            (self._heard[layer], mean, var) for layer, ran, mean, var in batches if ran and layer in self._heard
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
    def measure(self) -> Tensor:
        """Return the drift of all layers since `start`: (L, 4), in the order of `DRIFT_STATISTICS`, on the layers'
        device.

        NaN for a layer that took no batch in, or whose buffers don't tell and for which nothing was handed in. Of
        several batches since then it is their mean.

        Raises:
            RuntimeError: `start` was not called.
        """
        if not self.layers:
            return torch.empty(0, 4)
        if self._before is None:
            raise RuntimeError(
                "DriftMeter.measure() without start(): call start() before the batch, measure() after it."
            )
        after = self._buffers()  # batches that are on their way from other ranks arrive, and are heard of
        self.close()
        mean, var, tracked = self._before
        batches = after[2] - tracked
        weight = self._per_channel(self._newest_weight(after[2], batches))
        batch_mean, batch_var = mean + (after[0] - mean) / weight, var + (after[1] - var) / weight
        batch_mean, batch_var = self._with_handed(batch_mean, batch_var)
        shift, log_ratio = drift(batch_mean, batch_var, mean, var, self._eps)
        measured = summarise_drift(self._rows(shift), self._rows(log_ratio), self._widths)
        return torch.where((batches > 0)[:, None], measured, torch.nan)

    def _buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Running means and variances of all layers in one flat vector each, and the numbers of batches they took in,
        (L,)."""
        means = torch.cat([layer.running_mean.to(self._device) for layer in self.layers]).to(self._dtype)
        variances = torch.cat([layer.running_var.to(self._device) for layer in self.layers]).to(self._dtype)
        return means, variances, torch.stack([layer.num_batches_tracked.to(self._device) for layer in self.layers])

    def _newest_weight(self, step: Tensor, batches: Tensor) -> Tensor:
        """Weight of the newest batches in each layer's statistics: (L,), NaN where the layer's rule can't tell."""
        weights = torch.full(step.shape, torch.nan, dtype=self._dtype, device=self._device)
        # Layers of one rule together: for a whole model it is a handful of kernels, and not as many for each layer.
        rules: dict[object, tuple[Averaging, list[int]]] = {}
        for index, layer in enumerate(self.layers):
            rule = rule_of(layer)
            rules.setdefault(_key(rule), (rule, []))[1].append(index)
        for rule, indices in rules.values():
            members = self._index(tuple(indices))
            weight = rule.newest_weight(step[members], batches[members])
            if weight is not None:
                weights[members] = weight.to(self._dtype)
        return weights

    def _with_handed(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The same with what was handed in, in the places of those layers; a batch that was not finite is left out."""
        if not self._handed:
            return mean, var
        widths = [layer.num_features for layer in self.layers]
        nothing = torch.full_like(mean, torch.nan).split(widths)
        rounds = []
        for handed in self._handed:
            pairs = [handed.get(index, (none, none)) for index, none in enumerate(nothing)]
            rounds.append(torch.stack([torch.cat([pair[place].to(mean) for pair in pairs]) for place in (0, 1)]))
        known = torch.stack(rounds)
        known = torch.where(known[:, 1:].isfinite(), known, torch.nan).nanmean(0)
        return torch.where(known[0].isnan(), mean, known[0]), torch.where(known[1].isnan(), var, known[1])

    def _per_channel(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self._widths, output_size=int(sum(layer.num_features for layer in self.layers)))

    def _rows(self, flat: Tensor) -> Tensor:
        return torch.cat((flat, flat.new_zeros(1)))[self._places]

    def _index(self, members: tuple[int, ...]) -> Tensor:
        if members not in self._groups:
            self._groups[members] = torch.tensor(members, device=self._device)
        return self._groups[members]


def _key(rule: Averaging) -> object:
    """What rules have in common that weigh their newest batches alike; of a user's own, its repr need not tell."""
    return (type(rule), rule.extra_repr()) if type(rule) in (Exponential, Cumulative) else rule


def _nothing() -> None:
    """What ends listening before it has begun."""
