"""From what the layers saw to their new statistics, and to what is reported about them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_bn.buffers import running_mean, running_var
from lightning_bn.discovery import BatchNormLayer
from lightning_bn.moments import statistics_shift
from lightning_bn.ranks.collective import Ranks
from lightning_bn.recalibration.collection import PassResult
from lightning_bn.recalibration.histories import with_one_history
from lightning_bn.recalibration.report import LayerReport
from lightning_bn.recalibration.tally import Summary
from lightning_bn.recalibration.transaction import StatisticsChange
from lightning_bn.set_in_use import set_in_use

Statistics = tuple[Tensor, Tensor]


class Estimator:
    """How the statistics of each of `layers` follow from data: which variance, and how much the old ones weigh.

    Every rank must make one, since ranks may start from different statistics: with a prior, those of the first rank
    count.
    """

    def __init__(self, layers: list[BatchNormLayer], ranks: Ranks, *, pooled: bool, prior: float) -> None:
        self.old: list[Statistics] = [
            (running_mean(layer.module).clone(), running_var(layer.module).clone()) for layer in layers
        ]
        self._pooled = pooled
        self._prior = prior
        self._before = self.old
        if prior and ranks.are_several:
            first = ranks.share([(mean.cpu(), var.cpu()) for mean, var in self.old])[0]
            self._before = [(mean.to(own), var.to(own)) for (mean, var), (own, _) in zip(first, self.old, strict=True)]

    def __call__(self, place: int, summary: Summary) -> Statistics:
        """Return mean and variance, (C,), for the layer at `place`, in the dtype of its buffers and on their device."""
        old = self._before[place]
        if math.isinf(self._prior):
            return old
        mean, var = (
            self._blend(*pair, summary) for pair in zip(old, summary.statistics(pooled=self._pooled), strict=True)
        )
        return mean, var

    def _blend(self, old: Tensor, new: Tensor, summary: Summary) -> Tensor:
        if self._prior:
            weight = summary.samples / (summary.samples + self._prior)
            new = old.to(new) * (1 - weight) + new * weight
        return new.to(old)


def agreed_changes(
    layers: list[BatchNormLayer], ranks: Ranks, estimate: Estimator, seen: PassResult
) -> list[StatisticsChange | None]:
    """Return the change of each layer, None for one that saw no data; bit-identical on all ranks. Every rank must call
    it.

    Where ranks have kept averages of different batches, the histories of these become those of the first rank: a
    distributed checkpoint takes each tensor from another rank, and would mix them.

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
    first = ranks.share([None if pair is None else (pair[0].cpu(), pair[1].cpu()) for pair in new])[0]
    rows = list(zip(layers, estimate.old, first, strict=True))
    if not torch.cat([pair[1] for pair in first if pair is not None]).isfinite().all():
        _refuse_single_values(rows)
    changes = [None if pair is None else _change(layer, old, pair) for layer, old, pair in rows]
    return changes if not ranks.are_several else with_one_history(changes, ranks)


def _refuse_single_values(rows: list[tuple[BatchNormLayer, Statistics, Statistics | None]]) -> None:
    for layer, old, new in rows:
        if new is not None and not new[1].isfinite().all() and old[1].isfinite().all():
            raise ValueError(
                f"recalibrate(model, batches): {layer.name or 'the model'} ({layer.kind}) saw one value per channel, "
                "which has no variance. Pass more data, or with pooled=False larger batches."
            )


def _change(layer: BatchNormLayer, old: Statistics, new: Statistics) -> StatisticsChange:
    module = layer.module
    return StatisticsChange(module, old, (new[0].to(old[0]), new[1].to(old[1])), of_set=set_in_use(module))


def _nothing_seen(layers: list[BatchNormLayer], seen: PassResult) -> str:
    if not seen.batches:
        return (
            "recalibrate(model, batches): batches is empty. An iterator that was used before gives nothing more: pass "
            "a loader or a list."
        )
    if seen.skipped:
        return (
            f"recalibrate(model, batches): none of the {seen.batches} batches gave finite statistics. Look at the "
            f"data or the weights."
        )
    names = ", ".join(layer.name or "(the model)" for layer in layers[:3]) + (", ..." if len(layers) > 3 else "")
    return (
        f"recalibrate(model, batches): none of the {len(layers)} chosen layers ({names}) ran in {seen.batches} "
        "batches. Pass the model that runs them, or forward=lambda model, batch: ... that makes it run them."
    )


def layer_reports(
    layers: list[BatchNormLayer], changes: list[StatisticsChange], summaries: list[Summary]
) -> tuple[LayerReport, ...]:
    """Return the figures of each layer, computed for all at once."""
    figures = _figures(layers, changes, summaries).T.tolist() if layers else []
    return tuple(
        LayerReport(
            name=layer.name,
            kind=layer.kind,
            samples=int(samples),
            batches=int(batches),
            mean_shift_max=shift_max,
            mean_shift_rms=shift_rms,
            log_variance_ratio_max=ratio_max,
            log_variance_ratio_rms=ratio_rms,
            standard_error=error,
        )
        for layer, (samples, batches, shift_max, shift_rms, ratio_max, ratio_rms, error) in zip(
            layers, figures, strict=True
        )
    )


def _figures(layers: list[BatchNormLayer], changes: list[StatisticsChange], summaries: list[Summary]) -> Tensor:
    """Return a row for each figure and a column for each layer, (7, L), float64; all layers' channels lie side by side
    meanwhile."""
    widths = torch.tensor([len(change.old[0]) for change in changes])
    layer = torch.arange(len(layers)).repeat_interleave(widths)
    eps = torch.tensor([each.module.eps for each in layers], dtype=torch.float64)[layer]

    def flat(values: list[Tensor]) -> Tensor:
        return torch.cat([value.cpu() for value in values]).double()

    def rms(squared: Tensor) -> Tensor:
        return (torch.zeros(len(layers), dtype=torch.float64).index_add_(0, layer, squared) / widths).sqrt()

    def largest(values: Tensor) -> Tensor:
        return torch.zeros(len(layers), dtype=torch.float64).scatter_reduce_(0, layer, values.abs(), "amax")

    old_mean, old_var = (flat([change.old[place] for change in changes]) for place in range(2))
    new_mean, new_var = (flat([change.new[place] for change in changes]) for place in range(2))
    shift, ratio = statistics_shift(new_mean, new_var, old_mean, old_var, eps)
    return torch.stack(
        (
            torch.stack([summary.samples for summary in summaries]),
            torch.stack([summary.batches for summary in summaries]),
            largest(shift),
            rms(shift.square()),
            largest(ratio),
            rms(ratio.square()),
            rms(Summary.side_by_side(summaries).relative_errors(eps)),
        )
    )
