"""From the device to the host: once for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["joined", "to_host"]


@torch.no_grad()
def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the values of the tensors, all () or all (C,), one after the other: a copy on the device of the first, in
    the widest of their dtypes."""
    if not tensors:
        return torch.empty(0)
    first = tensors[0]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        dtype = max(dtypes, key=lambda each: each.itemsize)
        tensors = [tensor.detach().to(first.device, dtype) for tensor in tensors]
    elif any(tensor.device != first.device for tensor in tensors):
        tensors = [tensor.detach().to(first.device) for tensor in tensors]
    return torch.stack(list(tensors)) if first.dim() == 0 else torch.cat(list(tensors))


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of any shapes and dtypes to the host, bit for bit, in a single transfer: each would wait for the
    device anew."""
    if not tensors:
        return []
    device = next((tensor.device for tensor in tensors if tensor.numel()), tensors[0].device)
    if device.type == "cpu" and all(tensor.device == device for tensor in tensors):
        return list(tensors)
    of_dtype: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        of_dtype.setdefault(tensor.dtype, []).append(index)
    blocks = [
        torch.cat([tensors[index].detach().to(device).reshape(-1) for index in indices])
        for indices in of_dtype.values()
    ]
    packed = torch.cat([block.view(torch.uint8) for block in blocks]).cpu()
    host = list(tensors)
    parts = packed.split([block.numel() * block.element_size() for block in blocks])
    for part, (dtype, indices) in zip(parts, of_dtype.items(), strict=True):
        # A copy of its own: a view into the middle of the bytes may not be aligned for its dtype.
        pieces = part.clone().view(dtype).split([tensors[index].numel() for index in indices])
        for index, piece in zip(indices, pieces, strict=True):
            host[index] = piece.view(tensors[index].shape)
    return host
