"""Which batch norms of a fit learn."""

from __future__ import annotations

from torch.nn import Module

from lightning_bn.discovery import BatchNormLayer, find_batch_norms, in_eval_mode, learning


class LearningLayers:
    """The batch norms of a module that learn: not frozen, and in training mode when a batch was last trained.

    Attributes:
        found: all batch norms that keep running statistics.
        gone: the names of those that were learning and are there no more.
    """

    def __init__(self) -> None:
        self.found: list[BatchNormLayer] = []
        self.gone: set[str] = set()
        self._in_eval: set[Module] = set()

    def look(self, module: Module) -> None:
        """Find the layers as they are now; how they train is read off when a batch has been trained."""
        self.take_in(module)
        self.note_modes()

    def take_in(self, module: Module) -> None:
        """Let layers that came since the layers were last looked at count too, unless they are frozen."""
        now = find_batch_norms(module)
        self.gone |= self.names - {layer.name for layer in now}
        self.found = now

    def note_modes(self) -> None:
        """Note who is in training mode: to be called after a training step."""
        self._in_eval = in_eval_mode(self.found)

    @property
    def learning(self) -> list[BatchNormLayer]:
        """Those that learn."""
        return learning(self.found, self._in_eval)

    @property
    def names(self) -> set[str]:
        """Their names."""
        return {layer.name for layer in self.learning}
