"""The ResNets of He et al. (2016) for images of 3x32x32, shared by the benchmarks.

Each ReLU is a module of its own, so that hooks see it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Callable[[int, int, int], nn.Module]
"""Inputs, outputs and stride of a block whose sum needs another shape than its input has."""


def projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """A convolution and a batch norm: option B of section 3.3."""
    return nn.Sequential(convolution(inputs, outputs, stride), nn.BatchNorm2d(outputs))


def convolution(inputs: int, outputs: int, stride: int) -> nn.Module:
    """A convolution of 1x1 alone."""
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


class Padding(nn.Module):
    """No parameters: every `stride`-th pixel, and zeros for the channels that are new. Option A of section 3.3."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))


class Block(nn.Module):
    """What both blocks of figure 5 are: a branch, a shortcut, and a ReLU on their sum."""

    expansion = 1  # channels of the sum, in multiples of `width`

    def __init__(self, inputs: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.branch = nn.Sequential(*self.layers(inputs, width, stride))
        self.shortcut = nn.Identity() if (inputs, stride) == (outputs, 1) else shortcut(inputs, outputs, stride)
        self.relu = nn.ReLU()

    def layers(self, inputs: int, width: int, stride: int) -> list[nn.Module]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + self.shortcut(x))


class Basic(Block):
    """Figure 5, left: two convolutions of 3x3."""

    def layers(self, inputs: int, width: int, stride: int) -> list[nn.Module]:
        return [*_convolved(inputs, width, 3, stride), nn.ReLU(), *_convolved(width, width, 3)]


class Bottleneck(Block):
    """Figure 5, right: 1x1, 3x3 and 1x1, four times as wide outside as inside."""

    expansion = 4

    def layers(self, inputs: int, width: int, stride: int) -> list[nn.Module]:
        inside = [*_convolved(inputs, width, 1), nn.ReLU(), *_convolved(width, width, 3, stride), nn.ReLU()]
        return [*inside, *_convolved(width, width * self.expansion, 1)]


def _convolved(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]


def resnet(block: type[Block], counts: Sequence[int], width: int, shortcut: Shortcut = projection) -> nn.Sequential:
    """Return a network with `counts` blocks in each stage, of which each is twice as wide as the one before.

    The stem is as wide as the first stage's sums, so that no block of that stage has a `shortcut`.
    """
    channels = width * block.expansion
    layers = [*_convolved(3, channels, 3), nn.ReLU()]
    for stage, count in enumerate(counts):
        for number in range(count):
            stride = 2 if stage and not number else 1
            layers.append(block(channels, width * 2**stage, stride, shortcut))
            channels = width * 2**stage * block.expansion
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def resnet18(width: int = 64) -> nn.Sequential:
    """ResNet-18: 20 batch norms, 17 ReLUs; at a width of 64, 4800 channels."""
    return resnet(Basic, (2, 2, 2, 2), width)


def resnet20(shortcut: Shortcut = Padding) -> nn.Sequential:
    """The network of section 4.2: 19 batch norms, 19 ReLUs."""
    return resnet(Basic, (3, 3, 3), 16, shortcut)


def resnet50(width: int = 64) -> nn.Sequential:
    """ResNet-50 but for the first stage's shortcut: 52 batch norms, 49 ReLUs."""
    return resnet(Bottleneck, (3, 4, 6, 3), width)
