"""Samples of batch norms alone, which wait on their device until several are evaluated together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import NamedTuple

from torch import Tensor

from lightning_bn.activations.drift import DriftMeter, Readout
from lightning_bn.activations.host_to_sample import HostMeasurements, NormShapes, SampleBuilder
from lightning_bn.activations.pool_to_host import to_host
from lightning_bn.activations.sample import Sample


class _Kept(NamedTuple):
    meter: DriftMeter
    shapes: NormShapes
    affine: list[Tensor]
    readout: Readout

    def on_host(self, tensors: Iterator[Tensor]) -> _Kept:
        """Return the same with the next ones of `tensors`."""
        affine = list(islice(tensors, 2))
        readout = self.readout._replace(tensors=list(islice(tensors, len(self.readout.tensors))))
        return self._replace(affine=affine, readout=readout)

    def form(self) -> object:
        """What samples have in common that can be evaluated together."""
        tensors = (*self.affine, *self.readout.tensors)
        return self.meter, self.shapes, self.readout.rules, self.readout.handed, [each.shape for each in tensors]


class KeptSamples:
    """Drift and affine parameters at several steps: what is small, the transfer and the host's arithmetic, is done for
    all of them at once."""

    def __init__(self, builder: SampleBuilder) -> None:
        self._builder = builder
        self._waiting: list[_Kept] = []

    def add(self, meter: DriftMeter, shapes: NormShapes, affine: list[Tensor], readout: Readout) -> None:
        """Let a sample wait.

        Args:
            meter: of the norms that keep running statistics.
            shapes: of all norms.
            affine: their weights, and their biases.
            readout: of the meter.
        """
        self._waiting.append(_Kept(meter, shapes, affine, readout))

    def collect(self) -> list[Sample]:
        """Return the samples, in their order, and forget them."""
        waiting, self._waiting = self._waiting, []
        host = iter(to_host([tensor for each in waiting for tensor in (*each.affine, *each.readout.tensors)]))
        here = [each.on_host(host) for each in waiting]
        return [sample for _, alike in groupby(here, _Kept.form) for sample in self._build(list(alike))]

    def _build(self, kept: Sequence[_Kept]) -> list[Sample]:
        drifts = kept[0].meter.evaluate([each.readout for each in kept])
        return self._builder.build_norms(
            [
                HostMeasurements.of_norms(each.shapes, each.affine[0], each.affine[1], drift)
                for each, drift in zip(kept, drifts, strict=True)
            ]
        )
