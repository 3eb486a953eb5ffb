"""How far the batches have moved from the running statistics, read from the buffers alone: no hook, no look at an activation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging import Averaging, Cumulative, Exponential
from lightning_bn.layers.settlement import rule_of
from lightning_bn.moments import drift, wide_dtype

__all__ = ["DRIFT_STATISTICS", "DriftMeter", "summarise_drift"]

DRIFT_STATISTICS = ("drift_mean", "drift_mean_max", "drift_var", "drift_var_max")


def summarise_drift(shift: Tensor, log_ratio: Tensor, width: Tensor) -> Tensor:
    """Return the root mean square and the greatest absolute value over channels of both: (L, 4), in the order of `DRIFT_STATISTICS`.

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

    What the batches in between were like follows from how the running statistics moved: by an exponential average of momentum m, one batch
    is ``before + (after - before) / m``. An averaging says how much its newest batches weigh, or keeps the newest one
    (`Averaging.newest_weight`, `Averaging.newest_batch`). Drift is measured against the statistics *before* those batches: what an
    evaluation at that moment would have used.

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
        self._handed: dict[int, list[tuple[Tensor, Tensor]]] = {}
        if not self.layers:
            return
        self._device = self.layers[0].running_mean.device
        self._dtype = wide_dtype(self._device)
        widths = [layer.num_features for layer in self.layers]
        self._widths = torch.tensor(widths, device=self._device)
        starts = self._widths.cumsum(0) - self._widths
        places = torch.arange(max(widths), device=self._device)
        # Row l are the places of layer l's channels in the flat vector; past its width the place of the zero behind the last.
        self._places = torch.where(places < self._widths[:, None], starts[:, None] + places, sum(widths))
        self._eps = self._per_channel(torch.tensor([layer.eps for layer in self.layers], dtype=self._dtype, device=self._device))
        self._groups: dict[tuple[int, ...], Tensor] = {}

    def unreadable(self) -> list[int]:
        """Return the indices of the layers whose buffers don't tell what the newest batch was like.

        Their averaging is of another's making or exponential or cumulative with ``pooled=True``, or it is kept in 16 bits.
        """
        one = torch.ones((), dtype=torch.int64)
        return [
            index
            for index, layer in enumerate(self.layers)
            if _kept_batch(layer) is None
            and (torch.finfo(layer.running_mean.dtype).bits < 32 or rule_of(layer).newest_weight(one, one) is None)
        ]

    @torch.no_grad()
    def start(self) -> None:
        """Remember the running statistics as they are now."""
        self._handed = {}
        if self.layers:
            self._before = self._buffers()

    def hand_in(self, batches: Iterable[tuple[int, Tensor, Tensor]]) -> None:
        """Take note of what a batch was like in layers; where that is known it is not read from the buffers.

        Args:
            batches: index of the layer, the batch's mean (C,) and its *unbiased* variance (C,). Of several batches of a layer since `start`
                it is their mean.
        """
        for index, mean, var in batches:
            self._handed.setdefault(index, []).append((mean, var))

    @torch.no_grad()
    def measure(self) -> Tensor:
        """Return the drift of all layers since `start`: (L, 4), in the order of `DRIFT_STATISTICS`, on the layers' device.

        NaN for a layer that took no batch in, or whose buffers don't tell and for which nothing was handed in. Of several batches since then it is their mean; a
        window's is its newest batch.

        Raises:
            RuntimeError: `start` was not called.
        """
        if not self.layers:
            return torch.empty(0, len(DRIFT_STATISTICS))
        if self._before is None:
            raise RuntimeError("DriftMeter.measure() without start(): call start() before the batch, measure() after it.")
        (mean, var, tracked), after = self._before, self._buffers()
        batches = after[2] - tracked
        weight = self._per_channel(self._newest_weight(after[2], batches))
        batch_mean, batch_var = mean + (after[0] - mean) / weight, var + (after[1] - var) / weight
        batch_mean, batch_var = self._with_handed(batch_mean, batch_var)
        shift, log_ratio = drift(batch_mean, batch_var, mean, var, self._eps)
        measured = summarise_drift(self._rows(shift), self._rows(log_ratio), self._widths)
        return torch.where((batches > 0)[:, None], measured, torch.nan)

    def _buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Running means and variances of all layers in one flat vector each, and the numbers of batches they took in, (L,)."""
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
            # What an averaging of another's making depends on, its repr need not tell.
            key: object = (type(rule), rule.extra_repr()) if type(rule) in (Exponential, Cumulative) else id(rule)
            rules.setdefault(key, (rule, []))[1].append(index)
        for rule, indices in rules.values():
            members = self._index(tuple(indices))
            weight = rule.newest_weight(step[members], batches[members])
            if weight is not None:
                weights[members] = weight.to(self._dtype)
        return weights

    def _with_handed(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The same with what was handed in, or kept by an averaging, in the places of those layers."""
        known = {index: [kept] for index, layer in enumerate(self.layers) if (kept := _kept_batch(layer)) is not None} | self._handed
        if not known:
            return mean, var
        parts = iter([_mean(known[index]) if index in known else None for index in range(len(self.layers))])
        columns = torch.stack((mean, var)).split([layer.num_features for layer in self.layers], dim=1)
        filled = torch.cat([column if part is None else part.to(mean) for column, part in zip(columns, parts, strict=True)], dim=1)
        return filled[0], filled[1]

    def _per_channel(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self._widths, output_size=int(sum(layer.num_features for layer in self.layers)))

    def _rows(self, flat: Tensor) -> Tensor:
        return torch.cat((flat, flat.new_zeros(1)))[self._places]

    def _index(self, members: tuple[int, ...]) -> Tensor:
        if members not in self._groups:
            self._groups[members] = torch.tensor(members, device=self._device)
        return self._groups[members]


def _kept_batch(layer: _BatchNorm) -> tuple[Tensor, Tensor] | None:
    averaging = getattr(layer, "averaging", None)
    return averaging.newest_batch() if isinstance(averaging, Averaging) else None


def _mean(batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean of the batches' means and of their variances: (2, C)."""
    stacked = torch.stack([torch.stack(batch) for batch in batches])
    return stacked[0] if len(batches) == 1 else stacked.mean(0)
