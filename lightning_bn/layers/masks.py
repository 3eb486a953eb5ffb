"""Batch norm of input of which only some positions are valid."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from lightning_bn.moments import Moments


def masked_batch_norm(
    input: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Moments]:
    """Normalise `input` with the moments of its valid positions, which are returned too; the others come out as
    zero."""
    if has_torch_function((input, mask, weight, bias)):  # a synchronising mode takes the moments of all ranks
        return handle_torch_function(masked_batch_norm, (input,), input, mask, weight, bias, eps)
    kept = mask.unsqueeze(1)
    # What stands in the padding may be NaN, and NaN * 0 is NaN in the gradient of weight.
    input = torch.where(kept, input, 0.0)
    moments = Moments.of(input, mask)
    shape = (1, -1, *[1] * (input.dim() - 2))
    biased = moments.m2 / moments.count.clamp(min=1)
    output = (input - moments.mean.reshape(shape)) * torch.rsqrt(biased + eps).reshape(shape)
    if weight is not None:
        output = output * weight.reshape(shape)
    if bias is not None:
        output = output + bias.reshape(shape)
    return torch.where(kept, output, 0.0).to(input.dtype), moments


def check_mask(input: Tensor, mask: Tensor) -> None:
    """Raise unless `mask` is boolean and has an entry for each position of `input`."""
    expected = (input.shape[0], *input.shape[2:])
    call = f"forward(input of shape {tuple(input.shape)}, mask of shape {tuple(mask.shape)} and dtype {mask.dtype})"
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{call}: mask is boolean, True where a position is valid; pass mask=mask.bool() if 1 means valid in yours."
        )
    if tuple(mask.shape) != expected:
        raise ValueError(f"{call}: mask has one entry a position and none for channels, here shape {expected}.")
