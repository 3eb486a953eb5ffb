"""Which parameters learn, and which layers hold none that do."""

from __future__ import annotations

from torch import nn
from torch.optim import LBFGS

from lightning_bn.discovery import BatchNormLayer
from lightning_bn.rules.arguments import Setting
from lightning_bn.rules.observer import Observer


class Learning:
    """A parameter learns if it requires grad and, where the optimizers are known, one of them holds it.

    Args:
        observer: knows the model.
        setting: knows the optimizers, or not.
    """

    def __init__(self, observer: Observer, setting: Setting) -> None:
        optimizers = setting.optimizers() if setting.optimizers is not None else ()
        held = {id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]}
        own = {id(parameter) for module in observer.modules for parameter in module.parameters(recurse=False)}
        # Sharded parameters are others than the model's: then nothing is known.
        self.held = held if held & own else None
        self.repeats = setting.repeats or any(isinstance(each, LBFGS) for each in optimizers)
        """Whether an optimizer runs a batch several times at weights of its own."""

    def parameter(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter learns."""
        return parameter.requires_grad and (self.held is None or id(parameter) in self.held)

    def module(self, module: nn.Module, *, below: bool = True) -> bool:
        """Whether a parameter of the module, or of one below it, learns."""
        return any(self.parameter(parameter) for parameter in module.parameters(recurse=below))

    def frozen(self, layer: BatchNormLayer) -> bool:
        """Whether no parameter of the layer learns; a layer without any is as free as the module around it."""
        return layer.is_frozen(self.parameter)

    def left_out(self, layer: BatchNormLayer) -> bool:
        """Whether the layer's parameters require grad, and no optimizer holds one of them."""
        return self.frozen(layer) and any(
            parameter.requires_grad for parameter in layer.module.parameters(recurse=False)
        )
