"""Whether the weights that are evaluated are those that were recalibrated: anybody may exchange them, in any hook."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_bn.callbacks.both_lightnings import LightningModule, Trainer
from lightning_bn.sharding import local_value


class EvaluatedWeights:
    """Remembers what the parameters were like at one moment, by two sums of each.

    Values, since a version says nothing of what is written through ``.data``, and an address nothing of what is
    written in place.
    """

    def __init__(self) -> None:
        self._known: Tensor | None = None
        self._versions = 0
        self.come_late = False
        """Whether they were exchanged after the callback's own turn."""

    def remember(self, module: LightningModule) -> None:
        """These are the weights whose statistics the layers hold now."""
        self._known, self._versions = _sums(module), _versions(module)

    def expect(self) -> None:
        """The weights are still to come; any are others than these."""
        self._known, self._versions = torch.empty(0), -1

    def forget(self) -> None:
        """Nothing is known of the layers' statistics."""
        self._known = None

    def are_others(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether they were exchanged since `remember`, on any rank; False where nothing is remembered. Waits for the
        device."""
        return self._known is not None and _on_any_rank(trainer, self._differ(module))

    def were_exchanged(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether they are others now, or were in between, on any rank."""
        moved = _versions(module) != self._versions
        return self._known is not None and _on_any_rank(trainer, moved or self._differ(module))

    def _differ(self, module: LightningModule) -> bool:
        now = _sums(module)
        return self._known is None or now.shape != self._known.shape or not torch.equal(now, self._known.to(now.device))


def _on_any_rank(trainer: Trainer, here: bool) -> bool:
    """Every rank must ask, whatever it found itself: the ranks meet."""
    return bool(trainer.strategy.reduce_boolean_decision(here, all=False))


@torch.no_grad()
def _sums(module: nn.Module) -> Tensor:
    """(2, number of parameters), float64."""
    values = [local_value(parameter).detach() for parameter in module.parameters()]
    if not values:
        return torch.empty(2, 0, dtype=torch.float64)
    device = values[0].device
    sums = [
        torch.stack((value.sum(dtype=torch.float64), value.abs().sum(dtype=torch.float64))).to(device)
        for value in (each.real if each.is_complex() else each for each in values)
    ]
    return torch.stack(sums, 1).nan_to_num()


def _versions(module: nn.Module) -> int:
    return sum(0 if parameter.is_inference() else parameter._version for parameter in module.parameters())
