"""Which batch-norm layers of a model a recalibration is for."""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

from lightning_bn.choices import Choices, check_choices, is_chosen
from lightning_bn.discovery import BatchNormLayer, find_batch_norms, find_unserved, in_eval_mode, learning, unserved

Layers: TypeAlias = Choices | None
"""None, ``"all"``, or names, patterns, classes and functions of name and module."""


def choose(model: nn.Module, layers: Layers) -> list[BatchNormLayer]:
    """Return the layers of `model` that track running statistics and that `layers` names, in registration order.

    Raises:
        TypeError: `layers` is something else; a layer that is lazy and was not initialised.
        ValueError: there are none.
    """
    if layers is not None:
        check_choices(f"recalibrate(model, batches, layers={layers!r})", layers)
    tracking = [layer for layer in find_batch_norms(model) if layer.tracks]
    if not tracking:
        raise ValueError(
            f"recalibrate(model, batches): {type(model).__name__} has no batch-norm layer that keeps running "
            f"statistics.{unserved(model, constant=True)}"
        )
    _refuse_lazy(tracking)
    chosen = _wanted(tracking, model, layers)
    if not chosen:
        raise ValueError(_nothing(tracking, layers, model))
    return chosen


def not_supported(model: nn.Module, layers: Layers = None) -> tuple[str, ...]:
    """Return the norms whose statistics move and can't be recalibrated, each with the reason; none where `layers`
    chooses others."""
    everything = layers is None or layers == "all"
    return tuple(str(norm) for norm in find_unserved(model) if not norm.is_constant) if everything else ()


def _wanted(tracking: list[BatchNormLayer], model: nn.Module, layers: Layers) -> list[BatchNormLayer]:
    if layers is None:
        # In a model in training mode a layer in eval mode is one that the user froze; in a model in eval mode the flag
        # tells nothing.
        return learning(tracking, in_eval_mode(tracking) if model.training else ())
    return [
        layer
        for layer in tracking
        if layers == "all" or any(is_chosen(layers, name, layer.module) for name in layer.names)
    ]


def _refuse_lazy(layers: list[BatchNormLayer]) -> None:
    lazy = [layer.name for layer in layers if isinstance(layer.module, nn.modules.lazy.LazyModuleMixin)]
    if lazy:
        raise TypeError(
            f"recalibrate(model, batches): {', '.join(lazy)} is lazy and has no statistics yet. Run a batch through it "
            f"first."
        )


def _nothing(layers: list[BatchNormLayer], wanted: Layers, model: nn.Module) -> str:
    number = f"{len(layers)} batch-norm layers ({_listed(layers)})"
    if wanted is not None:
        return f"recalibrate(model, batches, layers={wanted!r}): it means none of the {number}."
    choose_others = "Pass layers='all' to recalibrate them nevertheless, or choose by name, as in layers='backbone.*'."
    free = learning(layers, ())
    if not free:
        return (
            f"recalibrate(model, batches): all {number} are frozen: none of their parameters requires grad. "
            + choose_others
        )
    return (
        f"recalibrate(model, batches): {_listed(free)} can learn, but are in eval mode in a model that is in "
        "training mode, so they are taken for frozen, as all "
        f"{number} are. If that was not meant, call model.train() first. {choose_others}"
    )


def _listed(layers: list[BatchNormLayer]) -> str:
    return ", ".join(layer.name or "(the model)" for layer in layers[:3]) + (", ..." if len(layers) > 3 else "")
