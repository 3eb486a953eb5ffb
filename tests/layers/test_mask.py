"""Masked input is the packed batch of its valid positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_bn import Averaging, BatchNorm1d, BatchNorm2d, BatchNorm3d, Cumulative, Exponential, Window

LAYERS = [(BatchNorm1d, (6, 3)), (BatchNorm1d, (4, 3, 5)), (BatchNorm2d, (4, 3, 4, 2)), (BatchNorm3d, (3, 3, 2, 2, 3))]
AVERAGES = [
    None,
    Exponential(0.3),
    Exponential(0.3, debias=True),
    Window(3),
    Window(2, pooled=True),
    Cumulative(pooled=True),
]


def pack(batch: Tensor, mask: Tensor) -> Tensor:
    """Return the valid positions as a batch (M, C)."""
    return batch.movedim(1, -1)[mask]


@pytest.mark.parametrize(("cls", "shape"), LAYERS)
@pytest.mark.parametrize("averaging", AVERAGES, ids=str)
def test_equals_packing(
    cls: type[nn.Module], shape: tuple[int, ...], averaging: Averaging | None, device: torch.device
) -> None:
    """Outputs in training and eval, and statistics, are those of the packed batch; padding, NaN even, comes out as
    zero."""
    masked = cls(3, averaging=averaging, device=device, dtype=torch.float32)
    packed = BatchNorm1d(3, averaging=averaging, device=device, dtype=torch.float32)
    nn.init.normal_(masked.weight)
    packed.load_state_dict(masked.state_dict())
    for training in (True, True, True, False):
        masked.train(training), packed.train(training)
        mask = torch.rand(shape[0], *shape[2:], device=device) > 0.4
        mask.view(-1)[:2] = True
        batch = torch.randn(shape, device=device) * 2 + 1
        batch[~mask.unsqueeze(1).expand_as(batch)] = float("nan")
        output = masked(batch, mask)
        torch.testing.assert_close(pack(output, mask), packed(pack(batch, mask)), rtol=1e-5, atol=1e-5)
        assert (pack(output, ~mask) == 0).all()
        torch.testing.assert_close(masked.running_mean, packed.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(masked.running_var, packed.running_var, rtol=1e-5, atol=1e-6)
    assert masked.num_batches_tracked == 3


@pytest.mark.parametrize("training", [True, False])
def test_gradients(training: bool) -> None:
    """First and second derivatives with respect to input, weight and bias are right, and those of the padding are
    zero."""
    layer = BatchNorm1d(2, dtype=torch.float64).train(training)
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    batch = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)

    def forward(batch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (batch, mask))

    arguments = (batch, *(torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2)))
    assert torch.autograd.gradcheck(forward, arguments)
    assert torch.autograd.gradgradcheck(forward, arguments)
    (gradient,) = torch.autograd.grad(layer(batch, mask).square().sum(), batch)
    assert (gradient[~mask.unsqueeze(1).expand_as(gradient)] == 0).all()


def test_nan_in_the_padding_reaches_no_gradient() -> None:
    """NaN * 0 is NaN: what stands in the padding is put away before it is multiplied, in training and in eval."""
    for training in (True, False):
        layer = BatchNorm1d(2).train(training)
        mask = torch.tensor([True, True, False])
        batch = torch.tensor([[1.0, 2.0], [3.0, 5.0], [float("nan")] * 2], requires_grad=True)
        layer(batch, mask).square().sum().backward()
        assert batch.grad.isfinite().all()
        assert layer.weight.grad.isfinite().all()


def test_full_mask_is_no_mask() -> None:
    """With every position valid the result is the unmasked one."""
    one, other = BatchNorm2d(3), BatchNorm2d(3)
    batch = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(one(batch, torch.ones(4, 2, 2, dtype=torch.bool)), other(batch))
    torch.testing.assert_close(one.running_var, other.running_var)


@pytest.mark.parametrize("valid", [0, 1])
@pytest.mark.parametrize("skip_nonfinite", [True, False])
def test_too_few_valid_positions(valid: int, skip_nonfinite: bool) -> None:
    """No variance can be had of fewer than two values: the output is finite and the statistics stay."""
    layer = BatchNorm1d(2, averaging=Window(3), skip_nonfinite=skip_nonfinite)
    mask = torch.arange(4) < valid
    assert layer(torch.randn(4, 2), mask).isfinite().all()
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_var, torch.ones(2))


def test_low_precision() -> None:
    """The moments of a bfloat16 batch are taken in float32, and the output has the input's dtype."""
    layer = BatchNorm1d(2)
    batch = (torch.randn(64, 2) * 0.5 + 3).bfloat16()
    assert layer(batch, torch.ones(64, dtype=torch.bool)).dtype == torch.bfloat16
    torch.testing.assert_close(layer.running_mean, 0.1 * batch.float().mean(0), rtol=1e-5, atol=1e-6)


def test_bad_masks() -> None:
    """A mask of the wrong dtype or shape raises, saying which call was made and what is wanted; nothing is counted."""
    layer, batch = BatchNorm2d(3), torch.randn(4, 3, 2, 2)
    with pytest.raises(TypeError, match=r"mask of shape \(4, 2, 2\) and dtype torch.int64.*mask.bool\(\)"):
        layer(batch, torch.ones(4, 2, 2, dtype=torch.int64))
    for shape in [(4, 3, 2, 2), (4,), (4, 2)]:
        with pytest.raises(ValueError, match=r"here shape \(4, 2, 2\)"):
            layer(batch, torch.ones(shape, dtype=torch.bool))
    assert layer.num_batches_tracked == 0
