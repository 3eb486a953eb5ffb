"""How a stream of batch moments becomes the running statistics of a layer.

Every kind of average has two estimators, chosen by `pooled`:

* ``pooled=False``, Ioffe & Szegedy's (2015, section 3.1) and torch's: the average of the batch means, and the average
  of the *unbiased within-batch* variances, each batch counted once. The spread of the means from batch to batch is in
  neither.
* ``pooled=True``: the mean and the *unbiased pooled* variance of the data of those batches taken together, each sample
  counted once. It has the spread between batches too.

The two agree for large independent batches and differ for small or correlated ones.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

STATE_OF = "state_of"
"""The key of a ``state_dict`` under which the text stands that says what the state means, as bytes: a checkpoint holds
tensors alone."""

_MEND = (
    "Build the layer with the averaging that the checkpoint was trained with. To start with an empty history, drop the "
    "keys that start with '{}'."
)


@dataclass(frozen=True)
class Batch:
    """What an averaging is told about one training batch; its statistics are per channel, and float32 at least."""

    __module__ = "lightning_bn"

    mean: Tensor
    """(C,)."""
    var: Tensor
    """(C,): *unbiased*, within the batch."""
    count: Tensor
    """Floating: values per channel. (), or (C,) for an elementwise averaging."""
    step: Tensor
    """int64: 1 for the first batch that counts. (), or (C,) likewise."""
    valid: Tensor | None
    """bool: whether the batch counts, which a non-finite one does not. (), or (C,) likewise. None if
    ``skip_nonfinite=False``."""

    def write(self, target: Tensor, value: Tensor) -> None:
        """Write `value` into `target` in place, unless the batch is skipped; does not synchronise with the device.

        Args:
            target: a tensor of the averaging's state; for an elementwise averaging its last dimension is that of the
                channels.
            value: what it shall hold, of the same shape.
        """
        target.copy_(value if self.valid is None else torch.where(self.valid, value.to(target.dtype), target))


class TrainingState(nn.Module):
    """A module whose declared tensors are private training state.

    A registered buffer is cast by ``.half()``, averaged by weight-averaging callbacks, broadcast by DDP at every
    forward and demanded by a strict load. State that only training reads must be spared all four, and yet survive
    ``state_dict`` -> ``load_state_dict``, ``.to(device)``, ``to_empty``, ``deepcopy`` and pickle. So the tensors are
    plain attributes, and this class overrides the three methods with which `torch.nn.Module` moves, saves and loads
    what a module owns; torch's own batch norm and RNNs override them too.

    The state of several modules may lie side by side in one tensor, of which each module's attribute is a view: whoever
    arranges that sets `tie`, and any assignment to an attribute, be it a moved tensor or another setting, unties the
    module again.
    """

    _state_names: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.tie = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("training", "tie"):  # what .train() and .eval() assign
            # Not by __dict__, into which torch.compile before 2.12 can't write. torch allows for no None in its types.
            super().__setattr__("tie", None)  # type: ignore[arg-type]
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # A view is saved with the whole of what it is a view of, so one layer's copy would carry the state of all.
        return (
            self.__dict__
            | {name: getattr(self, name).detach().clone() for name in self._state_names}
            | {"tie": None, "_of": None, "_others": None}
        )

    @property
    def state_meaning(self) -> str:
        """What the state means, in a few words; a checkpoint whose state means something else is refused."""
        return type(self).__name__

    @property
    def state_of(self) -> Tensor:
        """`state_meaning` as bytes, (length,) uint8; distributed checkpoints look each key of a ``state_dict`` up as an
        attribute."""
        return torch.frombuffer(bytearray(self.state_meaning.encode()), dtype=torch.uint8)

    def _declare(self, state: Mapping[str, Tensor]) -> None:
        """Take `state` as the private state; a tensor declared before under the same name and shape is written in
        place."""
        for name, value in state.items():
            present = getattr(self, name, None)
            like = (value.shape, value.dtype, value.device)
            if isinstance(present, Tensor) and (present.shape, present.dtype, present.device) == like:
                present.copy_(value)
            else:
                setattr(self, name, value)
        self._state_names = tuple(state)

    def state(self) -> dict[str, Tensor]:
        """Return the private tensors by name."""
        return {name: getattr(self, name) for name in self._state_names}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainingState:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, held in self.state().items():
            moved = fn(held)  # where that is a cast to fewer bits, the state keeps its accuracy
            is_wide = torch.promote_types(moved.dtype, held.dtype) == moved.dtype
            setattr(self, name, moved if is_wide else held.to(moved.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._state_names:
            # A copy: exponential moving averages of a whole state_dict (timm's ModelEma) write into the tensors they
            # find there.
            destination[prefix + name] = getattr(self, name).clone()
        if self._state_names:
            destination[prefix + STATE_OF] = self.state_of

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        keys = {prefix + name: name for name in self._state_names}
        saved = {name: state_dict[key] for key, name in keys.items() if key in state_dict}
        public = {key: value for key, value in state_dict.items() if key not in keys and key != prefix + STATE_OF}
        super()._load_from_state_dict(public, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        text = state_dict.get(prefix + STATE_OF)
        meaning = None if text is None else bytes(text.tolist()).decode()
        if meaning is not None and meaning != self.state_meaning:
            # torch raises for unexpected keys where it is strict, and returns them where it is not; that is all it
            # tells a module.
            why = f" (it holds the state of {meaning}, and this layer averages by {self}. {_MEND.format(prefix)})"
            unexpected_keys.append(prefix + STATE_OF + why)
            self.clear()
        elif not saved:
            # The checkpoint of a plain layer: no history came with it, so none is missing.
            self.clear()
        else:
            missing_keys.extend(key for key, name in keys.items() if name not in saved and strict)
            self._load(saved, prefix, error_msgs, assign=local_metadata.get("assign_to_params_buffers", False))
        self.__dict__["_of"] = None
        self.tie = None  # so that the next forward tells whose history it is

    def _load(self, saved: dict[str, Tensor], prefix: str, error_msgs: list[str], *, assign: bool) -> None:
        for name, value in saved.items():
            present: Tensor = getattr(self, name)
            if present.shape != value.shape:
                error_msgs.append(
                    f"size mismatch for {prefix}{name}: the checkpoint has {tuple(value.shape)}, this {self} has "
                    f"{tuple(present.shape)}. {_MEND.format(prefix)}"
                )
            elif assign or present.is_meta:
                setattr(self, name, value.detach().clone())
            else:
                present.copy_(value)

    def clear(self) -> None:
        """Forget everything, in place: the state is what it was before the first training batch."""
        with torch.no_grad():
            for name in self._state_names:
                getattr(self, name).zero_()


class Averaging(TrainingState, ABC):
    """The rule by which batch moments become running statistics.

    A layer keeps its own copy of the averaging it is given, so one object can configure a whole model.

    To write another, implement `update`. Where the rule needs more than the running statistics and the step number,
    return its tensors from `initial_state`. They become attributes, are part of ``state_dict``, ``.to(device)``,
    deepcopy and pickle, and are not changed by ``.half()``, DDP broadcasts and weight averaging. Write them with
    ``batch.write(target, value)``, so that a skipped batch leaves them alone.

    A rule is *elementwise* if each channel's statistics depend only on that channel's moments and state. Declare it
    with ``elementwise = True``: `update` is then called once for the channels of all layers that share the rule,
    instead of once per layer, and a model of 50 layers launches a fiftieth of the kernels. The package never guesses
    it, because a rule that averages over channels would silently mix layers. What such an `update` gets, and what
    `initial_state` returns, has the channels in its last dimension.

    Example:
        Polynomial decay averaging (Shamir & Zhang 2013, section 4), in which late batches weigh more:

        >>> import lightning_bn
        >>> class Polynomial(lightning_bn.Averaging):
        ...     def __init__(self, eta=3.0):
        ...         super().__init__()
        ...         self.eta = eta
        ...
        ...     def update(self, running_mean, running_var, batch):
        ...         weight = (self.eta + 1) / (batch.step + self.eta)
        ...         mean = running_mean + weight * (batch.mean - running_mean)
        ...         return mean, running_var + weight * (batch.var - running_var)
        >>> layer = lightning_bn.BatchNorm1d(3, averaging=Polynomial())
        >>> _ = layer(torch.tensor([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]]))
        >>> layer.running_mean
        tensor([1., 2., 3.])

        It treats each channel by itself, so it may be called once for all layers:

        >>> class ElementwisePolynomial(Polynomial):
        ...     elementwise = True
    """

    __module__ = "lightning_bn"

    elementwise: bool = False
    """Whether `update` treats each channel by itself, whatever layer it is of."""

    @abstractmethod
    def update(self, running_mean: Tensor, running_var: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the running statistics after `batch`, as new tensors; called without grad, once per training batch.

        Args:
            running_mean: (C,), before the batch, in the dtype of the batch's moments.
            running_var: (C,), likewise.
            batch: the batch's moments.

        C is the number of channels of a layer, or for an elementwise averaging of all layers that are updated together.
        """

    def newest_weight(self, step: Tensor, batches: Tensor) -> Tensor | None:
        """Return how much the newest `batches` batches, taken together, weigh in the running statistics after batch
        number `step`.

        With this weight a, the mean of their statistics is ``before + (after - before) / a``: a monitor reads from it
        what the batches were like, without a look at the activations. None, as here, where the running statistics don't
        tell.

        Args:
            step: int64, of any shape; the entries are treated one by one.
            batches: int64, the same shape; the weight of no batches is 0.
        """
        return None

    @property
    def by_momentum(self) -> bool:
        """Whether this is the average that torch's ``momentum`` means, so that its kernel can compute it in place."""
        return False

    @property
    def kernel_momentum(self) -> float | None:
        """The momentum with which torch's own kernel computes this average in place; None where only `update` can."""
        return None

    def initial_state(self, num_features: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Return the private state for a layer of `num_features` channels, as it is before the first batch: all zeros.

        For an elementwise averaging the last dimension of each tensor is `num_features`.

        Args:
            num_features: channels of the layer.
            dtype: of the batches' moments, at least float32.
            device: of the layer.
        """
        return {}

    def for_layer(self, running_mean: Tensor) -> Averaging:
        """Return a copy with fresh private state for the layer whose running mean is `running_mean`.

        Raises:
            ValueError: an elementwise averaging whose state does not have the channels last.
        """
        own = copy.deepcopy(self)
        dtype = torch.promote_types(running_mean.dtype, torch.float32)
        channels = running_mean.numel()
        state = own.initial_state(channels, dtype, running_mean.device)
        for name, value in state.items() if self.elementwise else ():
            if value.shape[-1:] != (channels,):
                raise ValueError(
                    f"{self!r} is elementwise, but its initial_state({channels}, ...) returns {name!r} of shape "
                    f"{tuple(value.shape)}: the last dimension must be that of the {channels} channels. Or leave out "
                    f"`elementwise = True`."
                )
        own._declare(state)
        own.__dict__.update(_of=weakref.ref(running_mean), _channels=channels)
        return own

    def follow(self, running_mean: Tensor) -> None:
        """Have the private state be the history of the statistics `running_mean`, (C,), which are updated next.

        Where the layer's former statistics still exist, as under ``torch.func.functional_call`` with buffers of the
        caller's, those in their place are another set, with a history of its own. Where they are gone, they were moved
        or replaced, and the history goes along. One of another size begins anew, with a warning.
        """
        of: weakref.ref[Tensor] | None = self.__dict__.get("_of")
        former = None if of is None else of()
        if self._state_names and not (former is running_mean and self.__dict__.get("_channels") == len(running_mean)):
            with torch.inference_mode(False):
                self._follow(running_mean, former)

    def _follow(self, running_mean: Tensor, former: Tensor | None) -> None:
        state = present = self.state()
        if former is not None and former is not running_mean:
            others = self.__dict__.get("_others") or WeakTensorKeyDictionary()
            others[former] = present
            state = others.pop(running_mean, {})
            self.__dict__["_others"] = others
        dtype = torch.promote_types(running_mean.dtype, torch.float32)
        fresh = self.initial_state(running_mean.numel(), dtype, running_mean.device)
        if state and any(state[name].shape != value.shape for name, value in fresh.items()):
            if any(not value.is_meta and bool(value.any()) for value in state.values()):  # there is a history
                warnings.warn(
                    f"A batch norm of {running_mean.numel()} channels has the history of another number, as after "
                    f"structured pruning: its {self} begins anew.",
                    stacklevel=2,
                )
            state = {}
        for name, value in fresh.items():
            held = state.get(name, value)
            value = value if held.is_meta else held.to(value.device)
            if value is not present[name]:
                setattr(self, name, value)
        self.__dict__.update(_of=weakref.ref(running_mean), _channels=len(running_mean))

    def settings(self) -> dict[str, Any]:
        """Return what the averaging was built with, its public attributes, without its state."""
        state = ("training", "tie", *self._state_names)
        return {name: value for name, value in vars(self).items() if name not in state and not name.startswith("_")}


def check_averaging(averaging: object, call: str) -> None:
    """Raise a TypeError that shows `call` unless `averaging` is an Averaging."""
    if not isinstance(averaging, Averaging):
        raise TypeError(
            f"{call}: averaging is an Averaging such as Window(20), Exponential(0.1) or Cumulative(), not "
            f"{averaging!r}."
        )


def apply_to_statistics(fn: Callable[[Tensor], Tensor], statistics: Tensor) -> Tensor:
    """Return ``fn(statistics)``, or where that is a cast to 16 bits, the statistics in float32: an average kept in
    bfloat16 stalls."""
    moved = fn(statistics)
    return statistics.to(moved.device, torch.float32) if moved.dtype.itemsize < 4 else moved
