"""Where a callback stands among the Trainer's others, whatever order the user gave."""

from __future__ import annotations

from lightning_bn.callbacks.both_lightnings import (
    Callback,
    StochasticWeightAveraging,
    Trainer,
    WeightAveraging,
    callbacks_of,
    set_callbacks,
)


def take_turn_after_weight_averaging(trainer: Trainer, callback: Callback) -> None:
    """Move `callback` behind the last callback that puts averaged weights in, if it stands before it; to be called from
    `setup`.

    The hooks of one event run in the order of ``trainer.callbacks``, and Lightning itself keeps `ModelCheckpoint` last.
    A callback that must see the averaged weights therefore needs no more than this one move; among all others it stays
    where the user put it.
    """
    order = callbacks_of(trainer)
    averaging = [
        place for place, other in enumerate(order) if isinstance(other, (WeightAveraging, StochasticWeightAveraging))
    ]
    if callback not in order or not averaging or order.index(callback) > averaging[-1]:
        return
    # Inserted before it is removed, so that the place is counted in the order as it was.
    order.insert(averaging[-1] + 1, callback)
    order.remove(callback)
    set_callbacks(trainer, order)
