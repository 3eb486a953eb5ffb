"""Effective rank: how many directions a layer's activations use.

The activations are a matrix, a row for each position and a column for each channel. With p its singular values divided
by their sum, the effective rank is ``exp(-sum(p * log(p)))`` (Roy and Vetterli 2007): from 1, where all positions are
multiples of one vector, to the number of channels. Activations are not centred, as where the loss of rank is studied
(Dohare et al. 2024).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_bn.moments import wide_dtype

# Values at once: so many in float64 take little memory.
_AT_ONCE = 2**20


@torch.no_grad()
def gram(data: Tensor) -> Tensor:
    """Return the products of all pairs of channels, summed over all positions: (C, C), widest dtype, for data of shape
    (N, C, *spatial). A sum over batches and ranks is that of all their positions; NaN and infinite values count as 0.

    Singular values are roots of its eigenvalues: in float64 that loses nothing that an entropy would show.
    """
    width = data.shape[1]
    positions = data.movedim(1, -1).reshape(-1, width)
    dtype = wide_dtype(data.device)
    total = torch.zeros(width, width, dtype=dtype, device=data.device)
    for part in positions.split(max(_AT_ONCE // width, 1)):
        wide = part.to(dtype, copy=True).nan_to_num_(0.0, 0.0, 0.0)
        total.addmm_(wide.T, wide)
    return total


def effective_rank(products: Tensor) -> float:
    """Return the effective rank of activations with these products of channels, on the host; NaN where all are 0, or
    one is not finite, with which `eigvalsh` raises, or gives any numbers."""
    if not products.isfinite().all():
        return float("nan")
    eigenvalues = np.linalg.eigvalsh(products.double().numpy())
    singular = np.sqrt(np.maximum(eigenvalues, 0.0))
    share = singular[singular > 0] / singular.sum()
    return float(np.exp(-(share * np.log(share)).sum())) if share.size else float("nan")
