"""Which dimension of an activation holds its channels."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lightning_bn.activations.watched_layers import normalised_width
from lightning_bn.discovery import user_name


class ChannelAxis:
    """Finds the channels of a layer's activations by the layers around it.

    A batch norm's and a group norm's are in dimension 1, as in (N, C, H, W); a layer norm's and an RMS norm's where its
    weight fits, which is the last one as a rule, as in (N, L, C). Any other's are in the last dimension where a linear
    layer or a layer norm next to it is as wide as that, and in dimension 1 where a convolution or batch norm is as wide
    as dimension 1. "Next to it" is the smallest module around it that has such a layer.

    Args:
        model: which holds the layers.
        given: the dimension for all layers but batch norms; None: to be found.
    """

    def __init__(self, model: nn.Module, given: int | None) -> None:
        self._given = given
        self._modules = {user_name(path): module for path, module in model.named_modules(remove_duplicate=False)}
        self._found: dict[tuple[str, int, int, int], int] = {}

    def of(self, name: str, tensor: Tensor) -> int:
        """Return the dimension, for an activation of a module or of a function that it calls."""
        module = self._modules.get(name)
        if isinstance(module, _BatchNorm) or tensor.dim() < 3:
            return 1 if self._given is None or isinstance(module, _BatchNorm) else self._given
        if self._given is not None:
            return self._given
        key = (name, tensor.dim(), tensor.shape[1], tensor.shape[-1])
        if key not in self._found:
            self._found[key] = self._search(name, module, *key[1:])
        return self._found[key]

    def _search(self, name: str, module: nn.Module | None, dims: int, second: int, last: int) -> int:
        if module is not None and (width := normalised_width(module)) is not None:
            return 1 if width == second and width != last else -1
        if isinstance(module, nn.GroupNorm):
            return 1
        for scope in _scopes(name):
            inside = [each for path, each in self._modules.items() if not scope or path.startswith(f"{scope}.")]
            is_last = last in {_last_width(each) for each in inside}
            is_second = second in {_second_width(each) for each in inside}
            if is_last or is_second:
                return -1 if is_last and (not is_second or dims == 3) else 1
        return 1


def _scopes(name: str) -> Iterator[str]:
    """The paths of the modules around a row, the smallest first; of a function, the module that calls it."""
    path, colon, _ = name.rpartition(":")
    path = path if colon else name.rpartition(".")[0]
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _last_width(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.embedding_dim if isinstance(module, nn.Embedding) else normalised_width(module)


def _second_width(module: nn.Module) -> int | None:
    if isinstance(module, _ConvNd):
        return module.out_channels
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    return module.num_features if isinstance(module, _BatchNorm) else None
