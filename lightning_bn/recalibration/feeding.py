"""How a batch goes into a model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Forward", "feed", "to_device"]

Forward = Callable[[Any, Any], Any]
"""``forward(model, batch)``: runs the model on a batch; what it returns is not looked at."""

_ADVICE = "Say how it goes in: recalibrate(model, batches, forward=lambda model, batch: model(...))."


def feed(model: nn.Module, batch: Any) -> Any:
    """Run `model` on `batch`: a tensor goes in as it is, of a tuple or list the first element, a mapping as keyword
    arguments.

    Raises:
        TypeError: the batch is something else, or the model's forward does not take the mapping's keys.
    """
    try:
        return _feed(model, batch)
    except NotImplementedError as error:
        # What torch raises for a module without a forward, and so does a LightningModule that has its training_step
        # alone.
        if "forward" in str(error) and type(model).__name__ in str(error):
            raise TypeError(
                f"{type(model).__name__} has no forward, so recalibrate(model, batches) can't run it. {_ADVICE}"
            ) from error
        raise


def _feed(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, (tuple, list)) and batch:
        return model(batch[0])
    if isinstance(batch, Mapping):
        _check_keywords(model, batch)
        return model(**batch)
    raise TypeError(
        f"a batch is a tensor, a non-empty tuple or list, or a mapping; this one is {_described(batch)}. {_ADVICE}"
    )


def _check_keywords(model: nn.Module, batch: Mapping[Any, Any]) -> None:
    try:
        inspect.signature(model.forward).bind(**batch)
    except TypeError as error:
        keys = ", ".join(map(repr, batch))
        raise TypeError(
            f"{type(model).__name__}.forward does not take the keys of the batch ({keys}): {error}. {_ADVICE}"
        ) from None


def _described(batch: Any) -> str:
    return f"an empty {type(batch).__name__}" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"


def to_device(batch: Any, device: torch.device) -> Any:
    """Return `batch` with every tensor in it on `device`; tuples, lists, mappings, dataclasses and whatever has a
    ``to`` are walked."""
    if isinstance(batch, Tensor) or callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(item, device) for item in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(item, device) for item in batch)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = {f.name: to_device(getattr(batch, f.name), device) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **moved)
    return batch
