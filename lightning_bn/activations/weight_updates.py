"""How large the gradients of layers' parameters are, and how far an optimizer step moves them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bn.activations.pool_to_host import Array, joined
from lightning_bn.discovery import user_name
from lightning_bn.sharding import is_sharded


class WeightUpdates:
    """Norms of the gradients, of the steps, and of the weights before them, of the layers with parameters of their own.

    Args:
        model: which holds the layers; one whose parameters are spread over ranks has none here (`is_spread`).
        layers: names of the layers; None: all.
    """

    def __init__(self, model: nn.Module, layers: Collection[str] | None = None) -> None:
        self._layers = layers
        self.is_spread = is_sharded(model)
        self._model = model
        self._gradients: dict[nn.Parameter, Tensor] = {}  # norms, ()
        self._before: dict[nn.Parameter, Tensor] = {}  # copies of the weights

    @torch.no_grad()
    def before_step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take gradients and weights in: an optimizer is about to move these parameters."""
        if self.is_spread:
            return
        for parameter in parameters:
            if (gradient := parameter.grad) is not None:
                values = gradient.coalesce().values() if gradient.is_sparse else gradient
                self._gradients[parameter] = _norm(values)
                # Of several steps in one batch, the way from before the first to behind the last.
                self._before.setdefault(parameter, parameter.detach().clone())

    @torch.no_grad()
    def measure(self) -> Tensor:
        """Return, for each parameter that took a step, the norms of gradient, step and weights before: (3, P)."""
        if not self._before:
            return torch.empty(3, 0)
        steps = [_norm(parameter.detach() - before) for parameter, before in self._before.items()]
        weights = [_norm(before) for before in self._before.values()]
        return joined([*self._gradients.values(), *steps, *weights]).reshape(3, -1)

    def of_layers(self, norms: Tensor) -> dict[str, Array]:
        """Return what `measure` gave, now on the host, by layer: the norm of the gradient and the ratio of the step's
        norm to the weights', over all parameters of the layer, in registration order; and forget it."""
        if not self._before:
            return {}
        squares = dict(zip(self._before, np.square(norms.double().numpy()).T, strict=True))
        found = {}
        for path, module in self._model.named_modules():
            own = [squares[each] for each in module.parameters(recurse=False) if each in squares]
            if own and (self._layers is None or user_name(path) in self._layers):
                gradient, step, weights = np.sqrt(np.sum(own, axis=0))
                found[user_name(path)] = np.array([gradient, step / weights if weights else np.nan])
        self._gradients, self._before = {}, {}
        return found


def _norm(values: Tensor) -> Tensor:
    """The Euclidean norm of all values: (), at least float32."""
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32))
    return norm
