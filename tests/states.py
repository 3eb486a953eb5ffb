"""What a module holds, compared: with itself before, with another, with an oracle of its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import lightning.pytorch as pl
import numpy as np
import torch
from oracles import Array, mean_and_unbiased_variance
from small_data import training_data
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all parameters and buffers."""
    return copy.deepcopy(module.state_dict())


def same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Whether two series of tensors hold the same values; NaN is like nothing."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def parameters_equal(one: pl.LightningModule, other: pl.LightningModule) -> bool:
    """Whether two modules have the same weights."""
    return same(one.parameters(), other.parameters())


def as_bytes(tensor: Tensor) -> bytes:
    """The bits of a tensor, NaN included."""
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Every batch-norm layer by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def hooks(module: nn.Module) -> int:
    """Count the hooks of a module and all of its parts."""
    return sum(
        len(each._forward_hooks) + len(each._forward_pre_hooks) + len(each._backward_hooks) for each in module.modules()
    )


def first_layer_statistics(state: dict[str, Tensor], inputs: Tensor | None = None) -> tuple[Array, Array]:
    """What `Small.bn1` would see of the whole training data with the weights in `state`: float64 loops over the rows,
    and the unbiased variance."""
    rows = (training_data().tensors[0] if inputs is None else inputs).double().numpy()
    weight, bias = state["first.weight"].double().numpy(), state["first.bias"].double().numpy()
    outputs = [[sum(w * x for w, x in zip(line, row, strict=True)) for line in weight] + bias for row in rows]
    return mean_and_unbiased_variance(np.stack(outputs))


def matches_weights(state: dict[str, Tensor], inputs: Tensor | None = None) -> bool:
    """Whether the statistics of `Small.bn1` in `state` are those of the training data under the weights in `state`."""
    expected = first_layer_statistics(state, inputs)
    actual = (state[f"bn1.running_{name}"].double().numpy() for name in ("mean", "var"))
    return all(np.allclose(a, e, rtol=1e-4, atol=1e-5) for a, e in zip(actual, expected, strict=True))
