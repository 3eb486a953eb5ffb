"""What was seen of one forward of one batch-norm layer: a small tuple while the batch runs, a record once somebody
asks."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["ForwardRecord", "Trace", "forward_of"]

Trace = tuple[int, bool, bool, bool, bool, bool, bool, int, int, bool, tuple[int, ...]]
"""layer, training, moved, tracking, grad, recomputed, failed, call, source, reweighted, shape of the input. See
`ForwardRecord`.

Equal for two batches that did the same, so that the comparison of two lists of them tells whether there is anything to
judge.
"""


class ForwardRecord(NamedTuple):
    """One forward of one batch-norm layer. Nothing in it was read from a device."""

    layer: int
    """Index into `Observer.layers`."""
    training: bool
    moved: bool
    """Whether it wrote the running statistics: whether the version of ``num_batches_tracked`` rose, which lives on the
    host."""
    tracking: bool
    """The layer's ``track_running_stats`` at that time."""
    grad: bool
    recomputed: bool
    """Whether it ran inside a backward pass: the recomputation of activation checkpointing."""
    failed: bool
    call: int
    """Which outermost call of the model it was part of, counted since `Observer.begin`; negative where the layer was
    called by itself."""
    source: int
    """Which input that call had: calls that were given the same tensor have the same number."""
    reweighted: bool
    """Whether the layer's affine weight was written since its first forward of this batch."""
    samples: int
    values: int
    """Values per channel."""


def forward_of(trace: Trace) -> ForwardRecord:
    """Return the record of what a hook saw.

    Example:
        >>> forward_of((0, True, True, True, True, False, False, 1, 0, False, (2, 3, 5, 5))).values
        50
    """
    shape = trace[-1]
    return ForwardRecord(
        *trace[:-1], samples=shape[0] if shape else 0, values=math.prod(shape[:1] + shape[2:]) if shape else 0
    )
