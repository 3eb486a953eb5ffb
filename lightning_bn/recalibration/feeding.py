"""How a batch goes into a model, which stays as it is but for what is wanted of the pass."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bn.modes import extra_pass
from lightning_bn.recalibration.kept_objects import kept
from lightning_bn.recalibration.kept_tensors import KeptTensors
from lightning_bn.recalibration.random_states import kept_random_states
from lightning_bn.torch_internals import all_modules, compiled_methods

Forward = Callable[[Any, Any], Any]
"""``forward(model, batch)``: runs the model on a batch; what it returns is not looked at."""

_CALL = "recalibrate(model, batches)"


def feed(model: nn.Module, batch: Any, call: str = _CALL) -> Any:
    """Run `model` on `batch`: of a tuple or list the first element goes in, a mapping as keyword arguments, anything
    else as it is, such as a tensor or a batch of graphs.

    Args:
        model: to be run.
        batch: what goes in.
        call: the user's, as an error is to show it.

    Raises:
        TypeError: the batch is None, a number or text, or the model's forward does not take the mapping's keys.
    """
    try:
        return _feed(model, batch, call)
    except NotImplementedError as error:
        # What torch raises for a module without a forward, and so does a LightningModule that has its training_step
        # alone.
        if "forward" in str(error) and type(model).__name__ in str(error):
            raise TypeError(
                f"{type(model).__name__} has no forward, so {call} can't run it. {_advice(call)}"
            ) from error
        raise


def _feed(model: nn.Module, batch: Any, call: str) -> Any:
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, (tuple, list)) and batch:
        return model(batch[0])
    if isinstance(batch, Mapping):
        _check_keywords(model, batch, call)
        return model(**batch)
    if batch is None or isinstance(batch, (tuple, list, str, bytes, int, float)):
        raise TypeError(f"{_described(batch)} is no batch that a model could be run on. {_advice(call)}")
    try:
        return model(batch)
    except (AttributeError, TypeError) as error:
        what = f"{type(model).__name__} can't be run on {_described(batch)} as it is"
        raise TypeError(f"{what}: {error}. {_advice(call)}") from error


def _check_keywords(model: nn.Module, batch: Mapping[Any, Any], call: str) -> None:
    try:
        inspect.signature(model.forward).bind(**batch)
    except TypeError as error:
        keys = ", ".join(map(repr, batch))
        raise TypeError(
            f"{type(model).__name__}.forward does not take the keys of the batch ({keys}): {error}. {_advice(call)}"
        ) from None


def _advice(call: str) -> str:
    return f"Say how it goes in: {call[:-1]}, forward=lambda model, batch: model(...))."


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


def runner(
    model: nn.Module, forward: Forward | None, device: torch.device | str | None, call: str = _CALL
) -> Callable[[Any], object]:
    """Return what runs `model` on a batch, which is moved to `device` or to where the model is.

    Args:
        model: to be run.
        forward: the user's own way, None for `feed`.
        device: None: where the model's first parameter is.
        call: the user's, as an error is to show it.
    """
    run = partial(feed, call=call) if forward is None else forward
    target = next(chain(model.parameters(), model.buffers())).device if device is None else torch.device(device)
    return lambda batch: run(model, to_device(batch, target))


@contextmanager
def all_else_kept(model: nn.Module, batches: object) -> Iterator[KeptTensors]:
    """Prepare the model for a pass over the data, and put back at exit what the preparation or the pass changes."""
    # Not inference mode, and out of the caller's: what the model caches on the way would be of no use for training.
    with (
        extra_pass(),
        kept_random_states(batches),
        kept(model=model) as tensors,
        _as_written(model),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        model.eval()
        yield tensors


@contextmanager
def _as_written(model: nn.Module) -> Iterator[None]:
    """Run no compiled code, and have compiled modules call what they were compiled from: torch 2.14
    keeps state on a stack from the begin of a compiled module's call to its end, which breaks where calls overlap."""
    found = [(vars(each), written) for each in all_modules(model) if (written := compiled_methods(each))]
    compiled = [{name: own[name] for name in written} for own, written in found]
    # Who compiles nothing need not import dynamo, which takes a second.
    uses_dynamo = "torch._dynamo" in sys.modules
    try:
        for own, written in found:
            own.update(written)
        with torch.compiler.set_stance("force_eager") if uses_dynamo else nullcontext():
            yield
    finally:
        for (own, _), methods in zip(found, compiled, strict=True):
            own.update(methods)


def with_the_weights_as_they_are(run: Callable[[Any], object], tensors: KeptTensors) -> Callable[[Any], None]:
    """Return a `run` after which the next batch meets the weights unchanged; in lockstep all batches run at once."""

    def run_one(batch: Any) -> None:
        run(batch)
        tensors.restore_parameters()

    return run_one
