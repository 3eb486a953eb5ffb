"""An evaluation whose batch norms normalise with each batch's own statistics."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_bn import BatchNorm1d, Window
from lightning_bn.recalibration.measuring import normalising_with_batches


class ReadsItsBuffers(nn.BatchNorm1d):
    """A subclass whose eval forward computes with the buffers itself."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            return super().forward(input)
        return (input - self.running_mean) / (self.running_var + self.eps).sqrt() * self.weight + self.bias


def normalised(batch: Tensor) -> np.ndarray:
    """The batch by its own mean and biased variance, in float64."""
    data = batch.double().numpy()
    return (data - data.mean(0)) / np.sqrt(data.var(0) + 1e-5)


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(3), BatchNorm1d(3, averaging=Window(2)), ReadsItsBuffers(3)],
    ids=["torch's", "this package's", "one that reads its buffers"],
)
def test_each_batch_is_normalised_by_itself(layer: nn.BatchNorm1d) -> None:
    """Whatever the class; a batch of one by the running statistics; and every buffer is as before, also in between."""
    layer.train()(torch.randn(16, 3) * 3 + 2)
    layer.eval()
    before, mean = copy.deepcopy(layer.state_dict()), layer.running_mean
    one = torch.randn(1, 3)
    expected_of_one = layer(one).detach()
    with normalising_with_batches([layer]):
        for size in (2, 5, 32):
            batch = torch.randn(size, 3) * 7 - 1
            np.testing.assert_allclose(layer(batch).detach().numpy(), normalised(batch), rtol=1e-4, atol=1e-5)
            assert layer.running_mean is mean
        torch.testing.assert_close(layer(one).detach(), expected_of_one)
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in before.items())
    assert torch.equal(layer(one), expected_of_one)


def test_padding_has_no_part_in_it() -> None:
    """A masked batch is normalised by its valid positions, and one with a single valid position as ever in eval."""
    layer = BatchNorm1d(2).eval()
    tokens = torch.randn(4, 2, 3) * 2 + 5
    mask = torch.arange(3) < torch.tensor([[3], [2], [1], [3]])
    valid = tokens.movedim(1, -1)[mask]
    single = torch.zeros_like(mask)
    single[0, 0] = True
    expected_of_one = layer(tokens, mask=single)
    with normalising_with_batches([layer]):
        output = layer(tokens, mask=mask).movedim(1, -1)[mask]
        np.testing.assert_allclose(output.detach().numpy(), normalised(valid), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(tokens, mask=single), expected_of_one)
