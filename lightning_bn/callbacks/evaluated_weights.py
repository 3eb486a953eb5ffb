"""Whose statistics the layers hold, and whether other weights are evaluated: anybody may exchange them, in any hook."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from lightning_bn.callbacks.both_lightnings import LightningModule, Trainer, evaluated_batches
from lightning_bn.discovery import find_batch_norms
from lightning_bn.error_boundary import UNBOUNDED, ErrorBoundary
from lightning_bn.ranks.collective import Ranks
from lightning_bn.sharding import is_sharded, local_value
from lightning_bn.torch_internals import is_compiled

_ROUNDING = 1e-12
"""Of a sum in float64, as a share of the sum of absolute values."""


class EvaluatedWeights:
    """Remembers what the parameters were like at one moment, by two sums of each.

    Values, since a version says nothing of what is written through ``.data``, and an address nothing of what is
    written in place.
    """

    def __init__(self, boundary: ErrorBoundary = UNBOUNDED) -> None:
        self._boundary = boundary  # around the hooks
        self._known: Tensor | None = None
        self._statistics = torch.empty(0)
        self._versions = 0
        self._module: nn.Module | None = None
        self._seen: tuple[Tensor, Tensor] | None = None  # parameters and statistics, in the first forward of a batch
        self._hooks: list[RemovableHandle] = []
        self._load: RemovableHandle | None = None
        self._looks: Literal["first", "last"] | None = None
        self._is_told = False
        self.come_late = False
        """Whether they were exchanged after the callback's own turn."""

    def remember(self, module: nn.Module) -> None:
        """These are the weights whose statistics the layers hold now."""
        self._module, self._known, self._versions = module, _sums(module.parameters()), _versions(module)
        self._statistics = _sums(_statistics(module))

    def remember_when_loaded(self, trainer: Trainer, module: LightningModule) -> None:
        """Until `stop_waiting`, the Trainer may read weights from a file, with their statistics: remember those."""

        def remember(loaded: nn.Module, _: Any) -> None:
            if trainer.ckpt_path:  # or it is an exchange, of a hook of the module; None until the file is opened
                self.remember(loaded)

        self.stop_waiting()
        hook = self._boundary.guard(remember)
        self._load = module.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]

    def stop_waiting(self) -> None:
        """What is loaded from now on is an exchange."""
        if self._load is not None:
            self._load.remove()
            self._load = None

    def expect(self) -> None:
        """The weights are still to come; any are others than these."""
        self._known, self._versions = torch.empty(0), -1

    def forget(self) -> None:
        """Nothing is known of the layers' statistics."""
        self._known = None

    def are_known(self, module: LightningModule) -> bool:
        """Whether anything is remembered of this module."""
        return self._known is not None and self._module in (None, module)

    def are_others(self, module: LightningModule, ranks: Ranks) -> bool:
        """Whether they were exchanged since `remember`, on any of the `ranks`, which all ask; False where nothing is
        remembered. Waits for the device."""
        return self._known is not None and any(ranks.share(not _same(_sums(module.parameters()), self._known)))

    def begin_batch(
        self, trainer: Trainer, module: LightningModule, index: int, loader: int, act_on_others: Callable[[], object]
    ) -> None:
        """Look at the weights of the first and of the last batch of an evaluation, if any are remembered.

        Args:
            trainer: whose evaluation it is.
            module: the one that is evaluated.
            index: of the batch in its loader.
            loader: its index.
            act_on_others: called before the first batch of a validation in a fit: callbacks that come later, and the
                module's own hook, may have exchanged the weights since the statistics were estimated.
        """
        if not self.are_known(module):
            return
        batches = evaluated_batches(trainer)
        if index == loader == 0:
            if trainer.state.fn == TrainerFn.FITTING:
                act_on_others()
            self.look(module, "first")
        elif loader == len(batches) - 1 and index == batches[-1] - 1:
            self.look(module, "last")

    def look(self, module: LightningModule, batch: Literal["first", "last"]) -> None:
        """Look at the weights that the next forward runs with, wherever in a step they are put in.

        Args:
            module: the one that is evaluated.
            batch: which batch of the evaluation begins.
        """
        self._module, self._versions = module, _versions(module)
        self._seen, self._looks = None, batch
        # A hook would compile it anew; in a sharded model's forward parameters are whole that are not before it.
        if not is_compiled(module) and not is_sharded(module):
            see = self._boundary.guard(self._see)
            self._hooks = [each.module.register_forward_pre_hook(see) for each in find_batch_norms(module)]

    def tell_of_others(self, trainer: Trainer, module: LightningModule, ranks: Ranks) -> None:
        """After a batch that `look` looked at: warn, once, where it ran with other weights and with the statistics of
        those that are remembered. Waits for the device.

        Args:
            trainer: whose evaluation it is.
            module: the one that is evaluated.
            ranks: which meet behind the first batch; they may have different last ones.
        """
        batch, self._looks = self._looks, None
        if batch is None or self._known is None:
            return
        for hook in self._hooks:
            hook.remove()
        seen, self._seen, self._hooks = self._seen, None, []
        if seen is None:
            others = _versions(module) != self._versions
        else:
            others = not _same(seen[0], self._known) and _same(seen[1], self._statistics)
        if (any(ranks.share(others)) if batch == "first" else others) and not self._is_told:
            self._is_told = True
            rank_zero_warn(_of_others(trainer))

    def _see(self, *_: Any) -> None:
        if self._seen is None and self._module is not None:
            self._seen = _sums(self._module.parameters()), _sums(_statistics(self._module))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": None, "_seen": None, "_hooks": [], "_load": None}


def _of_others(trainer: Trainer) -> str:
    if trainer.state.fn == TrainerFn.FITTING:
        return (
            "BatchNormRecalibration: the weights that validation evaluates are exchanged in "
            "on_validation_batch_start or inside of validation_step, or between two batches, after the statistics "
            "were recalibrated for other weights. Exchange them once, before the first batch: in "
            "on_validation_epoch_start of the module or of a callback; or write with recalibrated(self, batches): "
            "around that forward."
        )
    stage = "" if trainer.state.fn is None else trainer.state.fn.value
    return (
        f"BatchNormRecalibration: trainer.{stage} evaluates other weights than those that the layers' statistics "
        "belong to: they were exchanged in one of its hooks, or since the fit. Put recalibrate(self, batches), with "
        "training batches, behind the exchange."
    )


def _same(one: Tensor, other: Tensor) -> bool:
    # Another device, or another number of threads, adds in another order.
    return one.shape == other.shape and bool(((one - other.to(one.device)).abs() <= _ROUNDING * one[1]).all())


def _statistics(module: nn.Module) -> list[Tensor]:
    kept = (layer.module for layer in find_batch_norms(module) if layer.tracks)
    return [buffer for layer in kept for buffer in (layer.running_mean, layer.running_var) if buffer is not None]


@torch.no_grad()
def _sums(tensors: Iterable[Tensor]) -> Tensor:
    """(2, number of tensors), float64."""
    values = [local_value(tensor).detach() for tensor in _there(tensors)]
    if not values:
        return torch.empty(2, 0, dtype=torch.float64)
    device = values[0].device
    sums = [
        torch.stack((value.sum(dtype=torch.float64), value.abs().sum(dtype=torch.float64))).to(device)
        for value in (each.real if each.is_complex() else each for each in values)
    ]
    return torch.stack(sums, 1).nan_to_num()


def _versions(module: nn.Module) -> int:
    return sum(0 if each.is_inference() else each._version for each in _there(module.parameters()))


def _there(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Leave out what a first forward or `configure_model` has still to make."""
    return [tensor for tensor in tensors if not is_lazy(tensor) and not tensor.is_meta]
