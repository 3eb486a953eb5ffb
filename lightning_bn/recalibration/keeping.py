"""A model as it was, whatever is run on it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_bn.recalibration.kept_objects import KeptObjects
from lightning_bn.recalibration.kept_tensors import KeptTensors
from lightning_bn.sharding import is_transient

__all__ = ["Weights", "kept"]


class Weights:
    """The parameters of a model, given their values back between two batches."""

    def __init__(self, parameters: KeptTensors) -> None:
        self._parameters = parameters
        self._batches = 0

    def batch_is_done(self) -> None:
        """Undo what the batch wrote into parameters, so that the next one meets the weights as they are."""
        if not self._batches:
            # An average of weights is often written where no version counter sees it: whoever does so does it in the
            # first batch.
            self._parameters.find_silent_writes()
        self._parameters.restore_written()
        self._batches += 1


@contextmanager
def kept(**roots: object) -> Iterator[Weights]:
    """Put all back at exit that is written inside into `roots` and what hangs in them: values of tensors bit for bit,
    in place.

    Parameters and their gradients, buffers, which of them there are, modes, hooks, plain attributes, lists, dicts,
    metrics at any depth: see `KeptObjects` and `KeptTensors`. It takes the memory of a copy of all tensors. Not the
    values of parameters that FSDP 1 or DeepSpeed's stage 3 lends for a forward: these forget what is written into them.

    Args:
        **roots: modules, optimizers, batches; named as an error is to name them.

    Raises:
        TypeError: something that can't be put back, by name; before anything is done.
    """
    for root in roots.values():
        if isinstance(root, nn.Module):
            list(
                root.buffers()
            )  # those that are on their way from other ranks arrive, and the module has its own again
    objects = KeptObjects(roots)
    own = [parameter for parameter in objects.parameters if not is_transient(parameter)]
    parameters, tensors = KeptTensors(own), KeptTensors(objects.tensors)
    try:
        objects.exchange()
        yield Weights(parameters)
    finally:
        objects.restore()
        parameters.restore()
        tensors.restore()
