"""How a batch goes into a model."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[Any, Any], Any]
"""``forward(model, batch)``: runs the model on a batch; what it returns is not looked at."""

_ADVICE = "Say how it goes in: recalibrate(model, batches, forward=lambda model, batch: model(...))."


def feed(model: nn.Module, batch: Any) -> Any:
    """Run `model` on `batch`: of a tuple or list the first element goes in, a mapping as keyword arguments, anything
    else as it is, such as a tensor or a batch of graphs.

    Raises:
        TypeError: the batch is None, a number or text, or the model's forward does not take the mapping's keys.
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
    if batch is None or isinstance(batch, (tuple, list, str, bytes, int, float)):
        raise TypeError(f"{_described(batch)} is no batch that a model could be run on. {_ADVICE}")
    try:
        return model(batch)
    except (AttributeError, TypeError) as error:
        what = f"{type(model).__name__} can't be run on {_described(batch)} as it is"
        raise TypeError(f"{what}: {error}. {_ADVICE}") from error


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
    ``to`` are walked, and keep their classes. What arrives is what Lightning's own transfer would hand over."""
    if isinstance(batch, Tensor) or callable(getattr(batch, "to", None)):
        moved = batch.to(device)
        return batch if moved is None else moved  # some objects move themselves
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(item, device) for item in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(item, device) for item in batch)
    if isinstance(batch, Mapping):
        values = {key: to_device(value, device) for key, value in batch.items()}
        return values if type(batch) is dict else _of_its_class(batch, values)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = {f.name: to_device(getattr(batch, f.name), device) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **moved)
    return batch


def _of_its_class(batch: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """Return a mapping of the class of `batch`, which may have attributes too, with other values."""
    if not isinstance(batch, MutableMapping):
        return type(batch)(values)  # type: ignore[call-arg]
    copied = copy.copy(batch)
    for key, value in values.items():
        copied[key] = value
    return copied
