"""How a batch of the Trainer's loader goes into a LightningModule, where all that is wanted is that its layers run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

from lightning_bn.callbacks.both_lightnings import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    is_overridden,
)
from lightning_bn.callbacks.lightning_internals import inside_wrapper, number_of_batches
from lightning_bn.discovery import find_batch_norms
from lightning_bn.recalibration.kept_objects import kept


@dataclass(frozen=True)
class InputStyle:
    """One way to run a batch through the module."""

    call: str  # as a user would write it
    run: Callable[[LightningModule, Any], Any]


def input_styles(module: LightningModule, batch: Any) -> list[InputStyle]:
    """Return the styles that the signatures allow for a batch of this form, the preferred one first.

    | batch               | first                                   | then             | then            |
    |---------------------|-----------------------------------------|------------------|-----------------|
    | tuple or list       | `forward(batch[0])`                     | `forward(*batch)`| `training_step` |
    | mapping             | `forward(**batch)`, of the keys it names| `forward(batch)` | `training_step` |
    | tensor, other object| `forward(batch)`                        |                  | `training_step` |
    """
    styles: list[InputStyle] = []
    if is_overridden("forward", module):
        signature = inspect.signature(module.forward)
        for call, arguments in _forms(signature, batch).items():
            args, kwargs = arguments(batch)
            if _takes(signature, *args, **kwargs):
                styles.append(InputStyle(call, partial(_forward, arguments)))
    signature = inspect.signature(module.training_step)
    # One that takes a dataloader_iter asks for the loader itself.
    if module.automatic_optimization and "dataloader_iter" not in signature.parameters:
        index = (0,) if _takes(signature, None, 0) else ()
        styles.append(InputStyle("training_step(batch)", lambda module, batch: module.training_step(batch, *index)))
    return styles


class SizedBatches(Iterator[Any]):
    """Batches that know how many there are in all, if their source does: a progress bar asks."""

    def __init__(self, batches: Iterator[Any], source: Any) -> None:
        self._batches = batches
        self._source = source

    def __next__(self) -> Any:
        return next(self._batches)

    def __len__(self) -> int:
        return number_of_batches(self._source)


class BatchInput:
    """Knows how batches go into the module, once it has seen the first one.

    Args:
        forward: the user's own ``forward(module, batch)``, or None to find one.
        call: the user's call that needs it, for the error.
        advice: the call that would do without it, or with another.
        takes_forward: whether that call has a ``forward=``, for a call that was not tried.
    """

    def __init__(
        self,
        forward: Callable[[LightningModule, Any], Any] | None,
        *,
        call: str,
        advice: str,
        takes_forward: bool = False,
    ) -> None:
        self._style = None if forward is None else InputStyle("forward=", forward)
        self._call = call
        self._advice = advice
        self._takes_forward = takes_forward

    @property
    def known(self) -> bool:
        return self._style is not None

    def learn_from(self, trainer: Trainer, module: LightningModule, batches: Iterator[Any]) -> Iterator[Any]:
        """Find the call by the first batch, where it is not known; return all the batches again. The module is to be
        quiet meanwhile.

        Raises:
            MisconfigurationException: no call takes the batch; what each raised is in the message.
        """
        if self.known:
            return batches
        with kept(module=module):  # the module's transfer hooks see each batch
            first = list(islice(batches, 1))
        for batch in first:
            self._style = self._find(trainer, module, batch)
        return SizedBatches(chain(first, batches), batches)

    def run(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Run the module on the batch, under the Trainer's precision."""
        if self._style is None:
            raise RuntimeError("BatchInput.run: learn_from() finds out how a batch goes in, and comes first.")
        _run(trainer, module, self._style, batch)

    def _find(self, trainer: Trainer, module: LightningModule, batch: Any) -> InputStyle:
        # A signature tells which arguments a forward takes, not whether it can do with them: so each call is tried.
        failures: list[str] = []
        last: Exception | None = None
        for style in input_styles(module, batch):
            # The batch is the fit's own, and the step is about to be run on it.
            with kept(module=module, batch=batch):
                try:
                    module.eval()
                    _run(trainer, module, style, batch)
                    return style
                except Exception as error:  # a user's forward may raise anything; all of it is passed on below
                    how = " in eval mode" if style.call.startswith("training_step") else ""
                    failures.append(f"{style.call}{how} raised {type(error).__name__}: {error}")
                    last = error
        if not module.automatic_optimization:
            failures.append("training_step was not tried, since the module uses manual optimization")
        raise MisconfigurationException(
            f"{self._call} can't put a batch ({_form(batch)}) into {type(module).__name__}: "
            f"{'; '.join(failures) or 'no forward takes it'}. "
            f"{(_another_style(trainer, module, batch) if self._takes_forward else None) or self._advice}"
        ) from last


def _run(trainer: Trainer, module: LightningModule, style: InputStyle, batch: Any) -> None:
    # The precision context is around the forward alone: true half precision would also halve the tensors that moments
    # are kept in.
    with trainer.precision_plugin.forward_context():
        inside_wrapper(trainer, module, style.run, batch)


def calls_of_parts(module: LightningModule, value: Callable[[str], str] = lambda _: "...") -> str | None:
    """Return a ``forward=`` that calls the parts which hold batch-norm layers, as a user would write it; None where the
    module itself holds them.

    Args:
        module: of which the parts are.
        value: says what is known to go into a part of that name.
    """
    parts = dict.fromkeys(layer.name.split(".")[0] for layer in find_batch_norms(module) if "." in layer.name)
    calls = [f"module.{part}({value(part)})" for part in parts]
    if not calls:
        return None
    return f"forward=lambda module, batch: {calls[0] if len(calls) == 1 else '(' + ', '.join(calls) + ')'}"


def _another_style(trainer: Trainer, module: LightningModule, batch: Any) -> str | None:
    """Suggest to call the parts: the module itself was tried. Which of them take the batch's first part is tried too:
    the generator of a GAN takes noise, which only the training step knows."""

    def value(part: str) -> str:
        run = InputStyle(part, lambda module, batch: getattr(module, part)(batch[first] if is_parts else batch))
        try:
            with kept(module=module, batch=batch):
                module.eval()
                _run(trainer, module, run, batch)
        except Exception:  # a user's forward may raise anything; the message leaves the argument open
            return "..."
        return f"batch[{first!r}]" if is_parts else "batch"

    first = next(iter(batch.keys()), "inputs") if isinstance(batch, Mapping) else 0
    is_parts = isinstance(batch, (Mapping, Sequence))
    calls = calls_of_parts(module, value)
    if calls is None:
        return None
    left = " In place of ... goes what training_step gives that part, as noise for a generator." * ("..." in calls)
    return f"Call the parts that hold the batch-norm layers, each with what it takes: {calls}.{left}"


def _forms(signature: inspect.Signature, batch: Any) -> dict[str, Callable[[Any], tuple[Any, dict[str, Any]]]]:
    """Return how a batch of this form may go into a forward: the call, and its arguments."""
    whole: dict[str, Callable[[Any], tuple[Any, dict[str, Any]]]] = {"forward(batch)": lambda batch: ((batch,), {})}
    if isinstance(batch, Mapping):
        names = _named(signature, batch)
        keywords = {"forward(**batch)": lambda batch: ((), {name: batch[name] for name in names})}
        return {**keywords, **whole} if names else whole
    if isinstance(batch, Sequence) and batch and not isinstance(batch, (str, bytes)):
        return {
            "forward(batch[0])": lambda batch: ((batch[0],), {}),
            "forward(*batch)": lambda batch: (tuple(batch), {}),
        }
    return whole


def _forward(arguments: Callable[[Any], tuple[Any, dict[str, Any]]], module: LightningModule, batch: Any) -> Any:
    args, kwargs = arguments(batch)
    return module(*args, **kwargs)


def _named(signature: inspect.Signature, batch: Mapping[Any, Any]) -> list[str]:
    """The keys of `batch` that the signature names, or all of them where it takes any."""
    keys = tuple(batch.keys())  # some mappings give their parts when they are iterated
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        return [name for name in keys if isinstance(name, str)]
    return [name for name in keys if name in signature.parameters]


def _takes(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _form(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} of {', '.join(map(repr, batch.keys()))}"
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        return f"a {type(batch).__name__} of {', '.join(type(part).__name__ for part in batch)}"
    return f"a {type(batch).__name__}"
