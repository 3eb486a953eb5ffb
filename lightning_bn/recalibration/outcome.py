"""From what the layers saw to their new statistics, and to what is reported about them."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_bn.discovery import BatchNormLayer
from lightning_bn.ranks.collective import in_group, share
from lightning_bn.recalibration.collection import Seen
from lightning_bn.recalibration.report import LayerReport
from lightning_bn.recalibration.tally import Summary
from lightning_bn.recalibration.transaction import StatisticsChange

__all__ = ["Estimator", "agreed_changes", "layer_report"]

Statistics = tuple[Tensor, Tensor]


class Estimator:
    """How the statistics of each of `layers` follow from data: which variance, and how much the old ones weigh.

    Every rank must make one, since ranks may start from different statistics: with a prior, those of the first rank count.
    """

    def __init__(self, layers: list[BatchNormLayer], *, pooled: bool, prior: float) -> None:
        self.old: list[Statistics] = [(layer.module.running_mean.clone(), layer.module.running_var.clone()) for layer in layers]
        self._pooled = pooled
        self._prior = prior
        self._before = self.old
        if prior and in_group():
            first = share([(mean.cpu(), var.cpu()) for mean, var in self.old])[0]
            self._before = [(mean.to(own), var.to(own)) for (mean, var), (own, _) in zip(first, self.old, strict=True)]

    def __call__(self, place: int, summary: Summary) -> Statistics:
        """Return mean and variance, (C,), for the layer at `place`, in the dtype of its buffers and on their device."""
        old = self._before[place]
        if math.isinf(self._prior):
            return old
        mean, var = (self._blend(*pair, summary) for pair in zip(old, summary.statistics(pooled=self._pooled), strict=True))
        return mean, var

    def _blend(self, old: Tensor, new: Tensor, summary: Summary) -> Tensor:
        if self._prior:
            weight = summary.samples / (summary.samples + self._prior)
            new = old.to(new) * (1 - weight) + new * weight
        return new.to(old)


def agreed_changes(layers: list[BatchNormLayer], estimate: Estimator, seen: Seen) -> list[StatisticsChange | None]:
    """Return the change of each layer, None for one that saw no data; the same on all ranks, to the bit. Every rank must call it.

    Raises:
        ValueError: no layer saw any data; or one saw a single value per channel.
    """
    ran = [summary is not None and bool(summary.batches) for summary in seen.summaries]
    if not any(ran):
        raise ValueError(_nothing_seen(layers, seen))
    new = [
        estimate(place, summary) if summary is not None and data else None
        for place, (summary, data) in enumerate(zip(seen.summaries, ran, strict=True))
    ]
    # The same sums on other hardware may differ in the last bit: the first rank's decide.
    first = share([None if pair is None else (pair[0].cpu(), pair[1].cpu()) for pair in new])[0]
    rows = zip(layers, estimate.old, first, strict=True)
    return [None if pair is None else _change(layer, old, pair) for layer, old, pair in rows]


def _change(layer: BatchNormLayer, old: Statistics, new: Statistics) -> StatisticsChange:
    if not new[1].isfinite().all() and old[1].isfinite().all():
        raise ValueError(
            f"recalibrate(model, batches): {layer.name or 'the model'} ({layer.kind}) saw one value per channel, which has no variance. "
            "Pass more data, or with pooled=False larger batches."
        )
    return StatisticsChange(layer.module, old, (new[0].to(old[0]), new[1].to(old[1])))


def _nothing_seen(layers: list[BatchNormLayer], seen: Seen) -> str:
    if not seen.batches:
        return (
            "recalibrate(model, batches): batches is empty. An iterator that was used before gives nothing more: pass a loader or a list."
        )
    if seen.skipped:
        return f"recalibrate(model, batches): none of the {seen.batches} batches gave finite statistics. Look at the data or the weights."
    names = ", ".join(layer.name or "(the model)" for layer in layers[:3]) + (", ..." if len(layers) > 3 else "")
    return (
        f"recalibrate(model, batches): none of the {len(layers)} chosen layers ({names}) ran in {seen.batches} batches. "
        "Pass the model that runs them, or forward=lambda model, batch: ... that makes it run them."
    )


def layer_report(layer: BatchNormLayer, change: StatisticsChange, summary: Summary) -> LayerReport:
    """Return the figures of one layer."""
    eps = layer.module.eps
    (old_mean, old_var), (new_mean, new_var) = ([value.cpu().double() for value in pair] for pair in (change.old, change.new))
    shift = (new_mean - old_mean) / (old_var + eps).sqrt()
    ratio = ((new_var + eps) / (old_var + eps)).log()
    return LayerReport(
        name=layer.name,
        kind=layer.kind,
        samples=int(summary.samples),
        batches=int(summary.batches),
        mean_shift_max=_largest(shift),
        mean_shift_rms=_rms(shift),
        log_variance_ratio_max=_largest(ratio),
        log_variance_ratio_rms=_rms(ratio),
        standard_error=summary.standard_error(eps).item(),
    )


def _largest(values: Tensor) -> float:
    return values.abs().max().item()


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
