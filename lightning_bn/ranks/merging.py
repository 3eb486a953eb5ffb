"""Running statistics of the batches of all ranks, where each rank normalises with its own: one sum over the ranks for
all layers, under way while backward runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.deferred import DeferredUpdates
from lightning_bn.layers.group import Collected, LayerGroup
from lightning_bn.moments import Moments, wide_dtype
from lightning_bn.torch_internals import await_buffers

AddUp = Callable[[Tensor], Callable[[], None]]
"""Begins to replace a tensor by its sum over all ranks, in place; returns what waits for that."""


class ShiftedSums:
    """Sums from which the moments of the data of all ranks follow: per channel, with a shift s near the mean,

    ``n``, ``n (mean - s)`` and ``m2 + n (mean - s)**2``.

    The sums of many ranks are added up, in float64. Of the sums N, A and B the merged mean is ``s + A / N`` and m2 is
    ``B - A**2 / N``. A square is subtracted from a square, but these are small where s is near the mean: with s a
    hundred standard deviations off the variance is wrong by 5e-11 of itself (``benchmarks/merging_accuracy.py``).
    """

    @staticmethod
    def of(count: Tensor, values: Tensor, mean: Tensor, m2: Tensor, shift: Tensor) -> Tensor:
        """Return the sums of one rank side by side, (L + 2 C,).

        Args:
            count: (L,), values per channel of each layer.
            values: (C,), the same for each channel.
            mean: (C,).
            m2: (C,).
            shift: (C,), bit-identical on all ranks.
        """
        # A rank without data may hold anything as its mean.
        offset = torch.where(values > 0, mean - shift, 0.0)
        return torch.cat((count, values * offset, m2 + values * offset.square()))

    @staticmethod
    def moments(values: Tensor, first: Tensor, second: Tensor, shift: Tensor) -> Moments:
        """Return the moments that the added sums tell, (C,) each."""
        offset = first / values.clamp(min=1)
        return Moments(values, shift + offset, (second - first * offset).clamp(min=0))


class MergedUpdates(DeferredUpdates):
    """Settles a forward with the batches of all ranks.

    When the outermost forward ends, one sum over the ranks is begun, and waited for when somebody asks for a layer's
    buffers: the next forward, an evaluation, ``state_dict`` or whoever reads ``running_mean``. To wait is no meeting,
    so ranks may do so at different times. The shift is the mean that the ranks found at the last forward, which is
    bit-identical on all of them, whatever their buffers hold; at the first forward a sum of its own finds it.

    Args:
        layers: which are below the module that `attach` is given.
        add_up: how a tensor is summed over the ranks.
        counted: whether this rank's batches count: of ranks that normalise with one batch, those of the first do.
    """

    merges = True

    def __init__(self, layers: Iterable[_BatchNorm], add_up: AddUp, *, counted: bool = True) -> None:
        super().__init__(layers)
        self.add_up = add_up
        self.counted = counted
        self._shifts: dict[_BatchNorm, Tensor] = {}
        # By the number of forwards alone, which is the same on all ranks: how often they meet must not depend on what
        # one of them holds.
        self._have_met = False

    @torch.no_grad()
    def end(self) -> None:
        collected = [(group, group.collect(wide)) for round_ in self.rounds for group, wide in round_]
        merge = _Merge(self, collected)
        self.rounds = []
        if not self._have_met:
            merge.take_shifts()
            merge.begin()
        self._have_met = True
        await_buffers(merge.layers(), merge.settle)

    def shift(self, group: LayerGroup) -> Tensor:
        """Return what the means of the group's channels were at the last forward, (C,); zero where none is known."""
        dtype = wide_dtype(group.device)
        shifts = []
        for layer, size in zip(group.layers, group.sizes, strict=True):
            shift = self._shifts.get(layer)
            if shift is None or len(shift) != size:  # channels may have been removed
                shift = torch.zeros(size, dtype=dtype, device=group.device)
            shifts.append(shift)
        return torch.cat(shifts)

    def take_shift(self, group: LayerGroup, moments: Moments, before: Tensor) -> None:
        """Keep the means that were found, where there was data and it was finite."""
        known = (moments.count > 0) & moments.mean.isfinite()
        self._shifts.update(zip(group.layers, torch.where(known, moments.mean, before).split(group.sizes), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_shifts": {}, "_have_met": False}


class _Merge:
    """The sum over the ranks that a forward has begun."""

    def __init__(self, updates: MergedUpdates, collected: list[tuple[LayerGroup, Collected]]) -> None:
        self._updates = updates
        self._collected = collected
        self.begin()

    def layers(self) -> list[_BatchNorm]:
        return [layer for group, _ in self._collected for layer in group.layers]

    def begin(self) -> None:
        self._shifts = [self._updates.shift(group) for group, _ in self._collected]
        parts = [
            self._own(group, collected, shift)
            for (group, collected), shift in zip(self._collected, self._shifts, strict=True)
        ]
        self._sizes = [len(part) for part in parts]
        self._sums = torch.cat(parts)
        self._wait = self._updates.add_up(self._sums)

    def take_shifts(self) -> None:
        """Wait, and take the means that were found for the shifts of the next sum."""
        for (group, _), (_, moments), shift in zip(self._collected, self._merged(), self._shifts, strict=True):
            self._updates.take_shift(group, moments, shift)

    @torch.no_grad()
    def settle(self) -> None:
        """Wait, and let every group take in the batch of all ranks."""
        # Whoever asks may be evaluating in inference mode, whose tensors training could not go on with.
        with torch.inference_mode(False):
            for (group, collected), (count, moments), shift in zip(
                self._collected, self._merged(), self._shifts, strict=True
            ):
                self._updates.take_shift(group, moments, shift)
                group.settle(_of_all_ranks(group, count, moments, collected))

    def _own(self, group: LayerGroup, collected: Collected, shift: Tensor) -> Tensor:
        dtype = shift.dtype
        count, mean, var = collected.count.to(dtype), collected.mean.to(dtype), collected.var.to(dtype)
        if not self._updates.counted:
            count = torch.zeros_like(count)
        values = group.widened(count)
        return ShiftedSums.of(count, values, mean, torch.where(values > 1, var * (values - 1), 0.0), shift)

    def _merged(self) -> list[tuple[Tensor, Moments]]:
        """Wait, and return for each group the counts, (L,), and the moments of all ranks."""
        self._wait()
        merged = []
        for (group, _), sums, shift in zip(self._collected, self._sums.split(self._sizes), self._shifts, strict=True):
            channels = len(shift)
            count, first, second = sums.split([len(sums) - 2 * channels, channels, channels])
            merged.append((count, ShiftedSums.moments(group.widened(count), first, second, shift)))
        return merged


def _of_all_ranks(group: LayerGroup, count: Tensor, moments: Moments, own: Collected) -> Collected:
    dtype = own.mean.dtype
    mean, var = moments.mean.to(dtype), moments.variance(unbiased=True).to(dtype)
    valid = count > 1
    return Collected(mean, var, count.to(dtype), valid & group.finite(var) if group.skip_nonfinite else valid, own.ran)
