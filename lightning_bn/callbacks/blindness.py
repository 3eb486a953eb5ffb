"""What the monitor can't see, and says once."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_bn.activations.collector import LayerCollector
from lightning_bn.activations.episodes import STAGES
from lightning_bn.discovery import find_unserved, listing

# Layers whose names a warning has room for.
MAX_NAMED = 6
_NOT_CALLED = "no forward called it as a module: it has no part in this forward, or runs in compiled or scripted code"


class Blindness:
    """Remembers what has been told in a run."""

    def __init__(self) -> None:
        self._told: dict[str, set[str]] = {}  # by stage, the layers
        self._has_told_norms = False

    def of_all(self, module: nn.Module, layers: object, stage: str) -> None:
        """Warn that the choice of `layers`, as the user wrote it, finds nothing in the module; once a run."""
        if self._told:
            return
        self._told[stage] = set()
        wanted = "norm or activation function that can be seen" if layers is None else f"module for {layers!r}"
        rank_zero_warn(
            f"ActivationStatsMonitor(layers={layers!r}) finds nothing to look at: {type(module).__name__} has no "
            f"{wanted}. Name what it has, as in layers=nn.Conv2d or layers='encoder.*'. Code that torch.jit compiled "
            "hides its own."
        )

    def of_norms(self, module: nn.Module) -> dict[str, str]:
        """Warn of the norms whose running statistics can't be read, once a run; return them, and why. Those whose
        statistics never move are left out: nothing lags behind."""
        if self._has_told_norms:
            return {}
        self._has_told_norms = True
        found = [norm for norm in find_unserved(module) if not norm.is_constant]
        if found:
            rank_zero_warn(
                "ActivationStatsMonitor can't read the running statistics of "
                f"{listing([str(norm) for norm in found], MAX_NAMED)}. layers={found[0].name!r} looks at the "
                "activations."
            )
        return {norm.name: norm.reason for norm in found}

    def of_layers(self, collector: LayerCollector, stage: str, *, is_sampled: bool) -> dict[str, str]:
        """Warn of the layers of which nothing is seen, of each once a stage; return the new ones, and why.

        Args:
            collector: of the stage.
            stage: "train", "val" or "test".
            is_sampled: whether there was a sample, without which nothing could be seen.
        """
        told = self._told.setdefault(stage, set())
        # What a forward never called at first it may call later.
        unseen = collector.unseen() if is_sampled and not told else []
        left_out = {name: reason for name, reason in collector.left_out().items() if name not in told}
        told |= {*unseen, *left_out}
        if unseen:
            rank_zero_warn(
                f"ActivationStatsMonitor sees nothing of {listing(unseen, MAX_NAMED)} in {STAGES[stage]}: no forward "
                "called them as modules. They are not part of this forward, or run inside compiled or scripted code "
                "that is not a module of the model's."
            )
        if left_out:
            named = {reason: [name for name in left_out if left_out[name] == reason] for reason in left_out.values()}
            found = "; ".join(f"{listing(names, MAX_NAMED)} ({reason})" for reason, names in named.items())
            rank_zero_warn(f"ActivationStatsMonitor leaves out what it can't read in {STAGES[stage]}: {found}.")
        return dict.fromkeys(unseen, _NOT_CALLED) | left_out
