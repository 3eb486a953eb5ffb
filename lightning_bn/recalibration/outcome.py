"""From what the layers saw to their new statistics, and to what is reported about them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.buffers import running_mean, running_var
from lightning_bn.discovery import BatchNormLayer
from lightning_bn.layers.settlement import rule_of
from lightning_bn.moments import statistics_shift
from lightning_bn.ranks.collective import Ranks
from lightning_bn.recalibration.collection import PassResult
from lightning_bn.recalibration.report import LayerReport
from lightning_bn.recalibration.tally import Summary
from lightning_bn.recalibration.transaction import StatisticsChange
from lightning_bn.set_in_use import set_in_use

Statistics = tuple[Tensor, Tensor]


class Estimator:
    """How the statistics of `layers` follow from data: which variance, and how much the old ones weigh.

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
            self._before = ranks.share([(mean.cpu(), var.cpu()) for mean, var in self.old])[0]

    def of_layer(self, place: int, summary: Summary) -> Statistics:
        """Return mean and variance, (C,), for the layer at `place`, in the dtype of its buffers and on their device."""
        (new,) = _typed(self._of(summary, self._before[place : place + 1]), self.old[place : place + 1])
        return new

    def of_all(self, summary: Summary) -> Statistics:
        """Return mean and variance for all layers side by side, (C,), float64."""
        return self._of(summary, self._before)

    def _of(self, summary: Summary, before: list[Statistics]) -> Statistics:
        new = summary.statistics(pooled=self._pooled)
        if not self._prior:
            return new
        mean, var = (torch.cat([value.to(summary.mean) for value in values]) for values in zip(*before, strict=True))
        if math.isinf(self._prior):
            return mean, var
        weight = summary.samples / (summary.samples + self._prior)
        return mean * (1 - weight) + new[0] * weight, var * (1 - weight) + new[1] * weight


def _typed(new: Statistics, like: list[Statistics]) -> list[Statistics]:
    """Return each layer's part of statistics side by side, in the dtypes and on the devices of others."""
    means, variances = (value.split([len(mean) for mean, _ in like]) for value in new)
    return [(mean.to(old), var.to(old)) for mean, var, (old, _) in zip(means, variances, like, strict=True)]


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
    ran = [bool(batches[0]) for batches in seen.summary.batches.split([len(mean) for mean, _ in estimate.old])]
    if not any(ran):
        raise ValueError(_nothing_seen(layers, seen))
    # The same sums on other hardware may differ in the last bit: the first rank's decide.
    first = ranks.share(estimate.of_all(seen.summary))[0]
    changes = [
        StatisticsChange(layer.module, old, new, of_set=set_in_use(layer.module)) if data else None
        for layer, old, new, data in zip(layers, estimate.old, _typed(first, estimate.old), ran, strict=True)
    ]
    if not first[1].isfinite().all():
        _refuse_single_values(layers, changes)
    return changes if not ranks.are_several else _with_one_history(changes, ranks)


def _with_one_history(changes: list[StatisticsChange | None], ranks: Ranks) -> list[StatisticsChange | None]:
    """Return `changes` with the first rank's histories in them, where the ranks have different ones; every rank must
    call it."""
    own = [{} if change is None else _history(change.layer) for change in changes]
    prints = ranks.share([_fingerprint(history) for history in own])
    different = [place for place, each in enumerate(zip(*prints, strict=True)) if len(set(each)) > 1]
    if not different:
        return changes
    first = ranks.broadcast({place: _on_cpu(own[place]) for place in different}, 0)
    changed = list(changes)
    for place in different:
        change = changes[place]
        if change is not None:
            old = {name: tensor.clone() for name, tensor in own[place].items()}
            new = {name: value.to(old[name]) for name, value in first[place].items()}
            changed[place] = replace(change, tensors=own[place], old_history=old, new_history=new)
    return changed


def _history(layer: _BatchNorm) -> dict[str, Tensor]:
    """The tensors themselves of all that a later batch's average depends on."""
    count = layer.num_batches_tracked
    return rule_of(layer).state() | ({} if count is None else {"num_batches_tracked": count})


def _fingerprint(history: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in history.values():
        found.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _on_cpu(history: dict[str, Tensor]) -> dict[str, Tensor]:
    # A part of a tensor would be sent with the whole of it.
    return {name: tensor.detach().cpu().clone() for name, tensor in history.items()}


def _refuse_single_values(layers: list[BatchNormLayer], changes: list[StatisticsChange | None]) -> None:
    for layer, change in zip(layers, changes, strict=True):
        if change is not None and not change.new[1].isfinite().all() and change.old[1].isfinite().all():
            raise ValueError(
                f"recalibrate(model, batches): {layer.name or 'the model'} ({layer.kind}) saw one value per channel, "
                "which has no variance. Pass more data, or with pooled=False larger batches."
            )


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
    layers: list[BatchNormLayer], old: list[Statistics], changes: list[StatisticsChange | None], summary: Summary
) -> tuple[LayerReport, ...]:
    """Return the figures of each layer that has a change, computed for all at once."""
    new = [before if change is None else change.new for before, change in zip(old, changes, strict=True)]
    widths = torch.tensor([len(mean) for mean, _ in old])
    own = torch.arange(len(layers)).repeat_interleave(widths)
    eps = torch.tensor([each.module.eps for each in layers], dtype=torch.float64)[own]

    def rms(squared: Tensor) -> Tensor:
        return (torch.zeros(len(layers), dtype=torch.float64).index_add_(0, own, squared) / widths).sqrt()

    def largest(values: Tensor) -> Tensor:
        return torch.zeros(len(layers), dtype=torch.float64).scatter_reduce_(0, own, values.abs(), "amax")

    (old_mean, old_var), (new_mean, new_var) = map(_flat, (old, new))
    shift, ratio = statistics_shift(new_mean, new_var, old_mean, old_var, eps)
    first = widths.cumsum(0) - widths
    figures = torch.stack(
        (
            summary.samples[first],
            summary.batches[first],
            largest(shift),
            rms(shift.square()),
            largest(ratio),
            rms(ratio.square()),
            rms(summary.relative_errors(eps)),
        )
    )
    return tuple(
        LayerReport(layer.name, layer.kind, int(samples), int(batches), *others)
        for layer, change, (samples, batches, *others) in zip(layers, changes, figures.T.tolist(), strict=True)
        if change is not None
    )


def _flat(statistics: list[Statistics]) -> list[Tensor]:
    return [torch.cat([value.cpu() for value in values]).double() for values in zip(*statistics, strict=True)]
