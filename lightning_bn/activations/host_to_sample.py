"""From what was pooled to the rows of a sample: on the host, flat for all layers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.activations.call_sites import CallSite
from lightning_bn.activations.column import Statistic
from lightning_bn.activations.drift import Drift
from lightning_bn.activations.drift_by_chance import DriftByChance
from lightning_bn.activations.effective_rank import effective_rank
from lightning_bn.activations.formulas import distance, summarise_drift
from lightning_bn.activations.moments_to_pool import Key, Pool, what_of, width_of
from lightning_bn.activations.pool_to_host import (
    Array,
    Channels,
    Flags,
    Mask,
    Norms,
    pieces,
    silent_numbers,
)
from lightning_bn.activations.registry import COLUMNS, DRIFT_STATISTICS, ENTRIES, STATISTICS
from lightning_bn.activations.sample import ABSENT, KNOWN, SHOWN, WARM_UP, ByRow, Sample, States
from lightning_bn.activations.sample_history import ChannelHistory, ZeroStart
from lightning_bn.activations.sample_rows import Indices, RowLayout, RowNames, lay_out
from lightning_bn.moments import Moments
from lightning_bn.torch_internals import affine, parameters_of

# A channel of the input that hardly varies in training is compared in units of a tenth of the whole input's deviation.
INPUT_FLOOR = 0.01

_AFFINE, _WEIGHT, _BIAS = {"weight", "bias"}, itemgetter("weight"), itemgetter("bias")

# In what a layer that gives nothing but zeros shows.
SILENT = ("std", "zero_fraction", "dead_fraction", "died_channels")


def affine_of(norms: Iterable[_BatchNorm]) -> tuple[list[Any], list[Any]]:
    """Return the affine weight of each batch norm and its bias, something else than a tensor where it has none."""
    norms = list(norms)
    parameters = list(map(parameters_of, norms))
    if all(map(_AFFINE.issubset, parameters)):  # as they mostly are: in loops that run no Python for each layer
        return list(map(_WEIGHT, parameters)), list(map(_BIAS, parameters))
    pairs = list(map(affine, norms))
    return [weight for weight, _ in pairs], [bias for _, bias in pairs]


class NormShapes(NamedTuple):
    """What N batch norms have, which pruning may take away in the middle of a run: (N,) each."""

    widths: tuple[int, ...]  # channels
    has_weight: tuple[bool, ...]
    has_bias: tuple[bool, ...]


@dataclass(frozen=True)
class HostMeasurements:
    """What one sample brought to the host, of all ranks."""

    pool: Pool | None
    order: Mapping[Key, str]  # of activations in forward order, and the module that each is of
    outputs: frozenset[CallSite]  # whose activation is what the model returns
    images: frozenset[Key]  # inputs of which each channel has several values a sample
    shapes: NormShapes
    weights: Tensor  # of all batch norms that have one, one after the other
    biases: Tensor
    drift: Drift | None  # of the batch norms that keep running statistics
    sums: Mapping[tuple[str, Key], Tensor]  # histograms, and products of channels
    updates: Mapping[str, Array]  # by layer, norm of the gradient and ratio of the step's norm to the weights'

    @classmethod
    def of_norms(cls, shapes: NormShapes, weights: Tensor, biases: Tensor, drift: Drift | None) -> HostMeasurements:
        """Return what a sample of norms alone brings."""
        return cls(None, {}, frozenset(), frozenset(), shapes, weights, biases, drift, {}, {})


class SampleBuilder:
    """Makes a sample of what was measured, and remembers what tells warm-up and death apart.

    Args:
        layers: by name.
        tracking: names of the batch norms that keep running statistics.
        training: whether it is training, in whose first steps a layer may be what it was initialised with.
        hidden_norms: whether the model has batch norms and none is among the layers.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        tracking: Mapping[str, _BatchNorm],
        *,
        training: bool,
        hidden_norms: bool = False,
    ) -> None:
        self._hidden_norms = hidden_norms
        self._layers = layers
        self._training = training
        self._norms = {name: layer for name, layer in layers.items() if isinstance(layer, _BatchNorm)}
        self._tracks = np.array([name in tracking for name in self._norms], dtype=bool)
        self._names = RowNames()
        self._layouts: dict[object, RowLayout] = {}  # the newest alone
        self._zero_born: Mask | None = None  # norms whose weight has been 0 from the start
        self._born_small: Mask | None = None  # norms whose weight was 0 at the start, and grows
        self.history = ChannelHistory()
        self._chance = DriftByChance()
        self._zero_start = ZeroStart()
        self.given: dict[int, Moments] = {}  # by width, of all inputs of the model

    @silent_numbers()
    def build(self, found: HostMeasurements, reference: SampleBuilder | None = None) -> Sample:
        """Return the sample.

        Args:
            found: what was measured.
            reference: whose inputs, those of training, an evaluation's are compared with.
        """
        keys = () if found.pool is None else found.pool.keys
        if not keys and not self._norms and not found.updates:
            return Sample()
        layout = self._layout(found, keys)
        values = np.full((len(layout.labels), len(COLUMNS)), np.nan)
        states = np.zeros(values.shape, dtype=np.int8)
        channels: Callable[[], ByRow] = dict
        norms = self._of_norms([found])
        if norms is not None:
            _fill(values, states, "norm", norms, layout.norms)
        if found.pool is not None and (pool := found.pool.part("activation", "given")) is not None:
            centred = layout.flags.is_centred
            activations = Channels.of(
                pool, layout.flags, partial(self.history.update, centred=centred), _effective_ranks(found, pool)
            )
            _fill(values, states, "activation", activations, layout.activations)
            vectors = activations.channel_mean, activations.channel_std
            channels = partial(_by_row, layout.labels, layout.activations, activations.widths, *vectors)
            self._compare_input(pool, layout, reference, values, states)
        if found.pool is not None and (pool := found.pool.part("gradient")) is not None:
            nothing = np.zeros(len(pool.keys), dtype=bool)
            flags = Flags(*[nothing] * len(fields(Flags)))
            _fill(values, states, "gradient", Channels.of(pool, flags), layout.gradients)
        if found.updates:
            _fill(values, states, "weight", np.stack(list(found.updates.values())), layout.weights)
        if norms is not None:
            self._mark_warm_up(values, states, norms, layout.norms, layout.follows)
        if found.pool is not None and self._training:
            self._mark_beginning(values, states, found.pool, layout)
        rows = dict(zip(layout.keys, layout.labels, strict=True))
        histograms = {rows[key]: counts for (kind, key), counts in found.sums.items() if kind == "histogram"}
        drift = self._drift_by_row(found, layout)
        return Sample(layout.labels, layout.modules, values, states, channels, drift, histograms)

    @silent_numbers()
    def build_norms(self, found: Sequence[HostMeasurements]) -> list[Sample]:
        """Return T samples of norms alone, in their order, which together cost hardly more than one."""
        norms = self._of_norms(found)
        if norms is None:
            return [Sample()] * len(found)
        layout = self._layout(found[0], ())
        shape = (len(found), len(layout.labels), len(COLUMNS))
        values, states = np.full(shape, np.nan), np.zeros(shape, dtype=np.int8)
        # As if they were one sample of so many times as many norms.
        first = np.arange(shape[0])[:, None] * shape[1]
        rows, follows = ((first + each).ravel() for each in (layout.norms, layout.follows))
        flat = values.reshape(-1, shape[2]), states.reshape(-1, shape[2])
        _fill(*flat, "norm", norms, rows)
        self._mark_warm_up(*flat, norms, rows, follows)
        return [Sample(layout.labels, layout.modules, *each) for each in zip(values, states, strict=True)]

    def _layout(self, found: HostMeasurements, keys: tuple[Key, ...]) -> RowLayout:
        # Hardly ever another from sample to sample.
        what = (keys, tuple(found.order), found.outputs, found.images, tuple(found.updates))
        if what not in self._layouts:
            layout = lay_out(
                self._names,
                found.order,
                keys,
                self._layers,
                outputs=found.outputs,
                images=found.images,
                weighted=list(found.updates),
                hidden_norms=self._hidden_norms,
            )
            self._layouts = {what: layout}
        return self._layouts[what]

    def _of_norms(self, found: Sequence[HostMeasurements]) -> Norms | None:
        """The norms of T samples, one behind the other: T N of them."""
        if not self._norms:
            return None
        times, (widths, *has) = len(found), (np.array(each) for each in found[0].shapes)
        shape, tracks = (times, len(widths)), self._tracks
        drift, settled, drift_z = (np.full((*shape, columns), np.nan) for columns in (4, 4, 2))
        nonfinite, below_eps = np.full(shape, np.nan), np.full(shape, np.nan)
        ran, young = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        for place, each in enumerate(drifts := [each.drift for each in found if each.drift is not None]):
            drift[place, tracks], settled[place, tracks] = each.values, each.settled
            nonfinite[place, tracks], below_eps[place, tracks] = each.nonfinite, each.below_eps
            ran[place, tracks], young[place, tracks] = each.ran, each.young
        if drifts:
            drift_z[:, tracks] = self._chance.update_each(drifts, widths[tracks])
        weights, biases = (
            torch.cat([getattr(each, name) for each in found]).double().numpy() for name in ("weights", "biases")
        )
        has_weight, has_bias = (np.tile(each, times) for each in has)
        return Norms(
            *(np.tile(widths, times), weights, has_weight, biases, has_bias),
            *(drift.reshape(-1, 4), drift_z.reshape(-1, 2), settled.reshape(-1, 4)),
            *(ran.ravel(), below_eps.ravel(), young.ravel(), nonfinite.ravel(), np.tile(tracks, times)),
        )

    def _drift_by_row(self, found: HostMeasurements, layout: RowLayout) -> Callable[[], ByRow]:
        drift = found.drift
        if drift is None or not self._tracks.any():
            return dict
        rows, widths = layout.norms[self._tracks], np.array(found.shapes.widths)[self._tracks]
        return partial(_by_row, layout.labels, rows, widths, drift.shift, drift.log_ratio)

    def _compare_input(
        self, pool: Pool, layout: RowLayout, reference: SampleBuilder | None, values: Array, states: States
    ) -> None:
        for place in [place for place, what in enumerate(map(what_of, pool.keys)) if what == "given"]:
            key, start = pool.keys[place], sum(map(width_of, pool.keys[:place]))
            moments = Moments(*pool.channels[:3, start : start + key.width].double().unbind())
            known = self.given.get(key.width)
            self.given[key.width] = moments if known is None else known.merge(moments)
            if reference is not None and (before := reference.given.get(key.width)) is not None:
                rows = layout.activations[place : place + 1]
                _fill(values, states, "given", _input_drift(moments, before), rows)

    def _mark_warm_up(self, values: Array, states: States, norms: Norms, rows: Indices, follows: Indices) -> None:
        """Mark what a known start explains: statistics that begin with 0/1, norms whose weight begins with 0.

        Args:
            values: (T R, len(COLUMNS)), of T samples one behind the other.
            states: likewise.
            norms: T N of them.
            rows: (T N,), of the norms.
            follows: (T N,), of what they feed.
        """
        for place, name in enumerate(DRIFT_STATISTICS):
            if name in STATISTICS:
                _mark(values, states, name, rows, ~STATISTICS[name].sick(norms.settled[:, place]))
        # Small initial weights leave small variances, which the first steps mend.
        _mark(values, states, "below_eps_fraction", rows, norms.young)
        near = STATISTICS["weight_near_zero"]
        small = near.sick(near.value(norms))
        # Small from the first sample on, which an optimizer may have moved away from 0 by one step.
        each = small.reshape(-1, len(self._norms))
        self._born_small = each[0] if self._born_small is None else self._born_small
        before = self._born_small if self._zero_born is None else self._zero_born
        zero_born = np.logical_and.accumulate(np.concatenate((before[None], each)))[1:]
        self._zero_born = zero_born[-1]
        _mark(values, states, "weight_rms", rows, np.tile(self._born_small, len(each)))
        _mark(values, states, "weight_near_zero", rows, zero_born.ravel())
        if zero_born.any():
            for name in SILENT:
                _mark(values, states, name, rows, zero_born.ravel())
                _mark(values, states, name, follows, zero_born.ravel())
            _mark(values, states, "grad_std", slice(None), values[:, COLUMNS.index("grad_std")] == 0)

    def _mark_beginning(self, values: Array, states: States, pool: Pool, layout: RowLayout) -> None:
        """Mark what is zero because it is initialised with zero."""
        is_new = self._zero_start.update(pool)
        if not is_new.any():
            return
        what = np.array(list(map(what_of, pool.keys)))
        for kinds, rows, names in (
            (("activation", "given"), layout.activations, SILENT),
            (("gradient",), layout.gradients, ("grad_std",)),
        ):
            for name in names:
                _mark(values, states, name, rows, is_new[np.isin(what, kinds)])


def _mark(values: Array, states: States, name: str, rows: Any, explained: Mask | bool = True) -> None:
    """Mark what is sick in some rows of a column, and explained, as warm-up."""
    column = COLUMNS.index(name)
    sick = STATISTICS[name].sick(values[rows, column])
    if not sick.any():
        return
    sick &= states[rows, column] == KNOWN
    states[rows, column] = np.where(sick & explained, WARM_UP, states[rows, column])


def _fill(values: Array, states: States, source: str, found: object, rows: Indices) -> None:
    """Write all columns that are measured of one source."""
    columns = [column for column, entry in enumerate(ENTRIES) if entry.of == source]
    numbers = np.empty((len(columns), len(rows)))
    applies, judged = np.ones(numbers.shape, dtype=bool), np.ones(numbers.shape, dtype=bool)
    for place, entry in enumerate(ENTRIES[column] for column in columns):
        numbers[place] = entry.value(found)
        if entry.applies is not None:
            applies[place] = entry.applies(found)
        if isinstance(entry, Statistic) and entry.judged is not None:
            judged[place] = entry.judged(found)
    where = rows[:, None], columns
    values[where] = np.where(applies, numbers, np.nan).T
    states[where] = np.where(applies, np.where(judged, KNOWN, SHOWN), ABSENT).T


def _effective_ranks(found: HostMeasurements, pool: Pool) -> Array | None:
    """The effective rank of each row of a pool, None where it was measured of none."""
    grams = {key: products for (kind, key), products in found.sums.items() if kind == "gram"}
    return np.array([effective_rank(grams[k]) if k in grams else np.nan for k in pool.keys]) if grams else None


def _by_row(labels: Sequence[str], rows: Indices, widths: Indices, one: Array, other: Array) -> ByRow:
    """Return, by the labels of the rows, their parts of two vectors over all channels."""
    parts = zip(pieces(one, widths), pieces(other, widths), strict=True)
    return dict(zip([labels[row] for row in rows], parts, strict=True))


def _input_drift(now: Moments, training: Moments) -> Array:
    """How far what an evaluation is given lies from what training was given: (1, 4), as of a batch norm's input."""
    pooled = Moments(
        training.count.sum(), (training.count * training.mean).sum() / training.count.sum(), training.m2.sum()
    )
    between = (training.count * (training.mean - pooled.mean).square()).sum()
    floor = INPUT_FLOOR * (pooled.m2 + between) / (pooled.count - 1)
    width = len(now.mean)
    batch, running = ((each.mean.numpy(), each.variance(unbiased=True).numpy()) for each in (now, training))
    return summarise_drift(*distance(*batch, *running, np.full(width, floor.item())), np.array([width]))
