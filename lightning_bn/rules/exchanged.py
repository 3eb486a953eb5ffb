"""Weights that are exchanged for others, as callbacks that average them do, and whether the statistics went with
them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import nn

from lightning_bn.buffers import running_mean
from lightning_bn.discovery import BatchNormLayer
from lightning_bn.rules.gaps import LEAST_TRACKED
from lightning_bn.rules.probe import EvaluationProbe, far
from lightning_bn.rules.snapshots import StatisticsSnapshot, WeightSamples

__all__ = ["ExchangedWeights"]


class ExchangedWeights:
    """Compares weights and statistics with those at an earlier moment.

    Attributes:
        seen: whether weights were exchanged since the evaluation began.
    """

    def __init__(self) -> None:
        self.seen = False
        self._anchor: tuple[WeightSamples, StatisticsSnapshot] | None = None

    def anchor(self, model: nn.Module, layers: Sequence[BatchNormLayer]) -> None:
        """Remember weights and statistics for `since_anchor`."""
        self._anchor = WeightSamples(model), StatisticsSnapshot(layers)

    def forget(self) -> None:
        """Remember nothing."""
        self._anchor = None

    def since_anchor(
        self, model: nn.Module, layers: Sequence[BatchNormLayer], moving: Collection[int]
    ) -> list[str] | None:
        """Return which of the `moving` layers hold the statistics they held at `anchor`, None if no weights were
        exchanged since; waits for the device."""
        anchor, self._anchor = self._anchor, None
        if anchor is None or not anchor[0].differ(WeightSamples(model)):
            return None
        self.seen = True
        before, now = anchor[1].values(), StatisticsSnapshot(layers).values()
        return [
            each.layer.name
            for index, each in now.items()
            if index in moving and index in before and each.equals(before[index])
        ]

    def within(
        self, look: EvaluationProbe, layers: Sequence[BatchNormLayer], moving: Collection[int]
    ) -> tuple[Literal["before", "inside"], list[str], dict[str, float]]:
        """Return where weights were exchanged in an evaluation, which layers kept their statistics then, and which have
        others that do not fit the weights, with how many times their spread is off."""
        inside = [index for index in look.exchanged() if index in moving]
        stayed = [
            layers[index].name
            for index in inside
            if torch.equal(look.looks[index].mean, running_mean(layers[index].module))
        ]
        self.seen = self.seen or bool(inside)
        apart: dict[str, float] = {}
        if self.seen:
            tracked = StatisticsSnapshot(layers).counts()
            apart = {
                layers[index].name: times
                for index, times in far(look).items()
                if tracked.get(index, 0) >= LEAST_TRACKED and layers[index].name not in stayed
            }
        return "inside" if inside else "before", stayed, apart
