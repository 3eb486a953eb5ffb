"""How often tensors were written: autograd counts it on the host, so nothing waits for the device."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from lightning_bn.discovery import BatchNormLayer
from lightning_bn.torch_internals import buffers_of


def unsure(layers: Iterable[BatchNormLayer]) -> set[int]:
    """Return the indices of the layers with a forward of their own, which may move their statistics and count
    nothing."""
    known = ("torch.", "lightning_bn.")
    return {
        index
        for index, layer in enumerate(layers)
        # A layer that `BatchNormSync` synchronises has a forward that runs its class's.
        if not getattr(vars(layer.module).get("forward"), "follows_class", "forward" not in vars(layer.module))
        or not type(layer.module).forward.__module__.startswith(known)
    }


def writes(modules: Sequence[nn.Module], unsure: Collection[int]) -> list[int]:
    """Return how often a forward counted its batch in each of `modules`; for those in `unsure`, how often any of their
    statistics were written. On the host."""
    # The dicts are asked for anew: of a layer whose statistics are on their way from other ranks it is another one.
    all_buffers = [buffers_of(module) for module in modules]
    counts = versions(all_buffers, "num_batches_tracked")
    for index in unsure:
        for name in ("running_mean", "running_var"):
            counts[index] += version(all_buffers[index].get(name)) or 0
    return counts


def version(tensor: Tensor | None) -> int | None:
    """How often the tensor was written; None where that is not kept: there is no tensor, or it was made in inference
    mode."""
    try:
        return None if tensor is None else tensor._version
    except (
        RuntimeError
    ):  # asked for only where it fails: `is_inference` of every layer would cost more than the version
        return None


def versions(named: Iterable[Mapping[str, Tensor | None]], name: str) -> list[int]:
    """Return how often the tensors called `name` were written, by the fastest way there is: it is asked for all layers
    at each step. 0 where there is no tensor, or it keeps no count."""
    try:
        return [0 if (tensor := each.get(name)) is None else tensor._version for each in named]
    except RuntimeError:  # some were made in inference mode
        return [version(each.get(name)) or 0 for each in named]
