"""Which layers of a model are looked at: by type, by name, or by a function of the user's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.averaging import Averaging
from lightning_bn.choices import Choices, check_choices, is_chosen
from lightning_bn.discovery import user_name

# Of other packages' classes: LlamaRMSNorm, T5LayerNorm.
_ROW_NORMS = ("LayerNorm", "RMSNorm")

# A softmax gives probabilities, and attention is no function of one value: neither has a zero, a scale or a saturation
# worth a look.
_NO_ACTIVATIONS = {"MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax"}
ACTIVATION_FUNCTIONS: tuple[type[nn.Module], ...] = tuple(
    getattr(activation, name) for name in activation.__all__ if name not in _NO_ACTIVATIONS
)


def select_layers(model: nn.Module, choices: Choices | None = None) -> dict[str, nn.Module]:
    """Return the chosen modules of `model` by name, in registration order, each once.

    Args:
        model: any module.
        choices: None, all norms (batch, layer, group and RMS norm) and activation functions. Else one of these or
            several: a name, as ``"encoder"``; a pattern of names, as ``"layer4.*"``, which stands for the modules
            without modules of their own that it matches; a class, as ``nn.Conv2d``; a function of name and module, as
            ``lambda name, module: name.endswith("bn2")``.

    Raises:
        TypeError: a choice is none of these.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU()), nn.Linear(2, 2))
        >>> list(select_layers(model)), list(select_layers(model, "0.*")), list(select_layers(model, nn.Linear))
        (['0.1', '0.2'], ['0.0', '0.1', '0.2'], ['0.0', '1'])
    """
    if choices is not None:
        check_choices(f"layers={choices!r}", choices)
    # torch.compile's own module stands before the one it compiles, under the same name: the later one is the user's.
    named = {user_name(path): module for path, module in model.named_modules()}
    return {
        name: module
        for name, module in named.items()
        if is_watched(ACTIVATION_FUNCTIONS if choices is None else choices, name, module)
        or (choices is None and is_norm_layer(name, module))
    }


def fusible_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return, by name, the attention and encoder layers that torch may run as one kernel in eval mode: not where there
    is a hook in them, nor under a `TorchFunctionMode`, and the results then differ by rounding."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        attention = module.self_attn if isinstance(module, nn.TransformerEncoderLayer) else module
        if module not in inside and isinstance(attention, nn.MultiheadAttention) and attention.batch_first:
            found[user_name(path)] = module
            inside |= {*module.modules()}
    return found


def is_watched(choices: Choices, name: str, module: nn.Module) -> bool:
    """Tell whether one of `choices` means `module`; a batch norm's averaging is its own part, and gives no
    activations."""
    return not isinstance(module, Averaging) and is_chosen(choices, name, module)


def is_norm_layer(name: str, module: nn.Module) -> bool:
    """Tell whether a module normalises: a batch, layer, group or RMS norm, also another package's by its class's
    name."""
    return isinstance(module, (_BatchNorm, nn.GroupNorm)) or normalised_width(module) is not None


def normalised_width(module: nn.Module) -> int | None:
    """Return the channels of a layer norm or an RMS norm, None for any other module."""
    if not isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and not type(module).__name__.endswith(_ROW_NORMS):
        return None
    weight = getattr(module, "weight", None)
    shape = getattr(module, "normalized_shape", None) or (weight.shape if isinstance(weight, Tensor) else ())
    return int(shape[0]) if isinstance(shape, (tuple, list, torch.Size)) and len(shape) else None


def bounds_of(module: nn.Module) -> tuple[float, float] | None:
    """Return the least and the greatest value of a function of the sigmoid and tanh family, None for any other
    module."""
    if isinstance(module, (nn.Sigmoid, nn.Hardsigmoid)):
        return (0.0, 1.0)
    if isinstance(module, nn.Tanh):
        return (-1.0, 1.0)
    if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
        return (float(module.min_val), float(module.max_val))
    return None
