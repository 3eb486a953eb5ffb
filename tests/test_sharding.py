"""What is read of parameters that ranks may hold parts of."""

from __future__ import annotations

import torch
from torch import nn

from lightning_bn.sharding import full_vectors


def test_a_vector_that_is_elsewhere_is_nan_of_its_width() -> None:
    """FSDP and DeepSpeed leave storage without values, or a piece; what is no tensor is left out, the others stay."""
    plain, freed, piece = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    freed.untyped_storage().resize_(0)
    assert [each.tolist() for each in full_vectors([plain, plain], [3, 3])] == [[1.0] * 3] * 2
    for other, width in ((freed, 2), (piece, 4)):
        whole, lost = full_vectors([plain, None, other], [3, 5, width])
        assert whole.tolist() == [1.0] * 3
        assert (lost.shape, lost.isnan().all()) == ((width,), True)
        (lost,) = full_vectors([other], [width])
        is_lost = lost is not other  # whose values pytest would print, and there are none
        assert is_lost
        assert (lost.shape, lost.isnan().all()) == ((width,), True)
