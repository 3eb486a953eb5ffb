"""The moments of one batch per channel, faster than by batch norm's own kernel and with the accuracy of a float64 sum."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bn.moments import Moments
from lightning_bn.torch_internals import image_moments, kernel_moments

__all__ = ["channel_moments"]

# Values that are cheaper summed up in float64 one by one than in groups.
_FEW = 2**13
# Rows that the kernel sums in one go where it sums in float32: more and the sum loses digits, fewer and the merge costs time.
_ROWS = 32
# Positions of an image from which on group norm's kernel is the faster one.
_SMALL_IMAGE = 16
# From this ratio of mean to standard deviation on a sum in float32 around the wrong centre shows in the variance.
_FAR = 30.0


def channel_moments(data: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the *biased* variance of `data` per channel, in at least float32 and without a graph.

    Args:
        data: (N, C, *spatial), at least one value per channel.

    Returns:
        Two tensors of shape (C,), in float32 or float64.

    On the CPU batch norm's kernel is not the best: along a contiguous image it sums in float64 one by one, which takes 2 to 5 times as
    long as group norm's kernel takes; down the rows of an (N, C) or channels_last tensor it sums plainly in float32, and 33000 standard
    normal rows are off by 1e-5, the variance of data with mean 1000 and standard deviation 0.01 by 0.6%. Here rows are shifted by the
    first one and summed in groups, images each by itself, and the parts are merged in float64.

    Example:
        >>> channel_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        (tensor([2., 0.], dtype=torch.float64), tensor([1., 0.], dtype=torch.float64))
    """
    data = data.detach()
    if data.device.type != "cpu":
        return kernel_moments(data)
    samples, channels = data.shape[:2]
    positions = data.numel() // (samples * channels)
    if positions > 1 and data.is_contiguous():
        wide = data.dtype in (torch.float32, torch.float64)
        return _image_moments(data) if wide and positions >= _SMALL_IMAGE else kernel_moments(data)
    rows = data.movedim(1, -1)
    if rows.is_contiguous():
        return _row_moments(rows.reshape(-1, channels))
    return channel_moments(data.contiguous())


def _image_moments(data: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = _together(*image_moments(data))
    # NaN and infinity are not far from anything, and stay what they are.
    return kernel_moments(data) if (mean.square() > _FAR**2 * var).any() else (mean, var)


def _row_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(rows.dtype, torch.float32)
    origin = rows[0].to(wide, copy=True)
    rows = rows - origin if rows.dtype == wide else rows.to(wide).sub_(origin)
    positions, channels = rows.shape
    if rows.numel() <= _FEW:
        var, mean = torch.var_mean(rows, 0, unbiased=False)  # on the CPU a float64 sum, one by one
        return mean.double() + origin, var.double()
    groups = positions // _ROWS
    if not groups:
        mean, var = kernel_moments(rows)
        return mean.double() + origin, var.double()
    # A view: row r of it holds `groups` consecutive rows side by side.
    grouped = kernel_moments(rows[: groups * _ROWS].view(_ROWS, groups * channels))
    mean, var = _together(*(value.view(groups, channels) for value in grouped))
    if positions > groups * _ROWS:
        rest = _moments(positions - groups * _ROWS, *kernel_moments(rows[groups * _ROWS :]))
        merged = _moments(groups * _ROWS, mean, var).merge(rest)
        mean, var = merged.mean, merged.m2 / positions
    return mean + origin, var


def _together(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the moments of parts of equal size, (parts, C), in float64."""
    means, variances = means.double(), variances.double()
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


def _moments(count: int, mean: Tensor, var: Tensor) -> Moments:
    return Moments(torch.full((), count, dtype=torch.float64), mean.double(), var.double() * count)
