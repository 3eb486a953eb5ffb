"""What an exported program is made of, as far as batch norm goes; each format has a reader of its own that returns
this."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lightning_bn.checkpoints.norms import StoredNorm, Unjudged
from lightning_bn.checkpoints.stored import StoredTensor

Leaf = Tensor | StoredTensor
"""A tensor, perhaps still in its file."""


def loaded(leaf: Leaf) -> Tensor:
    """Return a tensor's numbers."""
    return leaf if isinstance(leaf, Tensor) else leaf.load()


@dataclass(frozen=True)
class NormUse:
    """A batch norm that the program still has."""

    name: str
    by_batch: bool | None
    """Whether it normalises with its batch; None where the program decides as it runs."""
    writes: bool = False
    """Whether each run moves its running statistics."""
    eps: float | None = None


@dataclass(frozen=True)
class WeightedUse:
    """A convolution or linear layer, which may have a batch norm folded into its weight."""

    name: str
    """The layer's, empty where the file does not tell."""
    transposed: bool
    """Whether the weight's second dimension is its output: of a transposed convolution, or of ``x @ weight``."""
    groups: int
    weight: Leaf
    bias: Leaf | None = None
    bias_elsewhere: bool = False
    """Whether it is added by another operation."""
    folded: str = ""
    """The batch norm that the file says is folded into it."""


@dataclass(frozen=True)
class Program:
    """An exported program."""

    kind: str
    """As ONNX."""
    uses: tuple[NormUse, ...]
    norms: tuple[StoredNorm, ...] = ()
    """Of the uses, those with statistics of their own."""
    layers: tuple[WeightedUse, ...] = ()
    random: tuple[str, ...] = ()
    """Operations that draw random numbers each time: live dropout and the like."""
    unjudged: tuple[Unjudged, ...] = field(default=())
