"""Networks as people write them, re-created small, each ReLU of a block one module that is used several times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


class Basic(nn.Module):
    """torchvision's BasicBlock: one ReLU for two places; the last norm may begin with weight 0."""

    def __init__(self, inputs: int, width: int, stride: int = 1, zero: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, stride=stride), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)
        same = (inputs, stride) == (width, 1)
        self.downsample = None if same else nn.Sequential(conv(inputs, width, 1, stride), nn.BatchNorm2d(width))
        if zero:
            nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """torchvision's Bottleneck: one ReLU for three places, of two widths."""

    def __init__(self, inputs: int, width: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, groups=groups), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, inputs, 1), nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + x)


class PreActivation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), conv(width, width)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.bn2(self.conv1(self.act(self.bn1(x))))))


class Dense(nn.Module):
    """A layer of a DenseNet: what it makes is put behind what it is given."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu, self.conv1 = nn.BatchNorm2d(inputs), nn.ReLU(), conv(inputs, 2 * growth, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), conv(2 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.norm1(x)))
        return torch.cat((x, self.conv2(self.relu(self.norm2(out)))), 1)


class Inverted(nn.Module):
    """A block of a MobileNet, with squeeze and excitation by a hard sigmoid or without."""

    def __init__(self, width: int, act: Callable[[], nn.Module], excite: bool) -> None:
        super().__init__()
        wide = 4 * width
        self.expand = nn.Sequential(conv(width, wide, 1), nn.BatchNorm2d(wide), act())
        self.depth = nn.Sequential(conv(wide, wide, groups=wide), nn.BatchNorm2d(wide), act())
        squeeze = (nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 4, 1), nn.ReLU(), nn.Conv2d(4, wide, 1), nn.Hardsigmoid())
        self.excite = nn.Sequential(*squeeze) if excite else None
        self.project = nn.Sequential(conv(wide, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.depth(self.expand(x))
        return x + self.project(out if self.excite is None else out * self.excite(out))


class NormAct(nn.BatchNorm2d):
    """timm's: a batch norm with its activation as a part of it."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))


class Zeroed(nn.Module):
    """timm's zero-initialised last norm, with an activation as a part of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = (
            conv(width, width),
            NormAct(width),
            conv(width, width),
            NormAct(width),
        )
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(self.bn1(self.conv1(x))))


class Excited(nn.Module):
    """Squeeze and excitation by a ReLU of many units, which are on or off for all images alike."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv(width, width), nn.BatchNorm2d(width), nn.ReLU()
        self.reduce, self.se_act = nn.Conv2d(width, 32, 1), nn.ReLU()
        self.expand, self.gate = nn.Conv2d(32, width, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x)))
        return x * self.gate(self.expand(self.se_act(self.reduce(x.mean((2, 3), keepdim=True)))))


class Scaled(nn.Module):
    """A branch whose scale begins with almost nothing (LayerScale) or with nothing at all (SkipInit, ReZero)."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.conv1, self.act, self.conv2 = nn.Conv2d(width, width, 3, 1, 1), nn.GELU(), nn.Conv2d(width, width, 3, 1, 1)
        self.scale, self.after = nn.Parameter(torch.tensor(scale)), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.after(self.conv2(self.act(self.conv1(x))) * self.scale)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.down, self.up = nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.one, self.norm1 = conv(3, 8), nn.BatchNorm2d(8)
        self.two, self.norm2 = conv(8, 16), nn.BatchNorm2d(16)
        self.three, self.norm3 = conv(24, 8), nn.BatchNorm2d(8)
        self.last, self.sigmoid = nn.Conv2d(8, 1, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        first = self.act(self.norm1(self.one(x)))
        second = self.act(self.norm2(self.two(self.down(first))))
        return self.sigmoid(self.last(self.act(self.norm3(self.three(torch.cat((first, self.up(second)), 1))))))


class Recurrent(nn.Module):
    """A block that is applied four times with the same weights, each time with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.relu = conv(3, 16), conv(16, 16), nn.ReLU()
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(4))
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm in self.norms:
            x = self.relu(norm(self.conv(x)))
        return self.head(x)


def head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def zero_head(width: int) -> nn.Sequential:
    made = head(width)
    nn.init.zeros_(made[-1].weight)
    return made


def stem(width: int) -> list[nn.Module]:
    return [conv(3, width), nn.BatchNorm2d(width), nn.ReLU()]


def generator() -> nn.Sequential:
    up = [nn.ConvTranspose2d(3, 16, 2, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU(True)]
    up += [nn.ConvTranspose2d(16, 8, 2, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(True)]
    return nn.Sequential(*up, nn.Conv2d(8, 3, 3, 1, 1), nn.Tanh())


def discriminator() -> nn.Sequential:
    down = [nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), conv(8, 16, 3, 2), nn.BatchNorm2d(16), nn.LeakyReLU(0.2)]
    return nn.Sequential(*down, head(16))


def shared_activation() -> nn.Sequential:
    act = nn.ReLU()
    return nn.Sequential(
        nn.Flatten(), nn.Linear(768, 64), nn.BatchNorm1d(64), act, nn.Linear(64, 32), act, nn.Linear(32, 4)
    )


def vgg() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 16), (16, 16)):
        layers += [conv(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, head(16))


def lenet() -> nn.Sequential:
    layers = [
        nn.Conv2d(3, 6, 5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: nn.Sequential(*stem(8), Basic(8, 8), Basic(8, 16, 2), Basic(16, 16), head(16)),
    "residual, zero-initialised": lambda: nn.Sequential(*stem(8), *(Basic(8, 8, zero=True) for _ in range(3)), head(8)),
    "bottleneck": lambda: nn.Sequential(*stem(16), Bottleneck(16, 8), Bottleneck(16, 8), head(16)),
    "aggregated": lambda: nn.Sequential(*stem(16), Bottleneck(16, 8, 4), Bottleneck(16, 8, 4), head(16)),
    "pre-activation": lambda: nn.Sequential(conv(3, 16), PreActivation(16), PreActivation(16), head(16)),
    "dense": lambda: nn.Sequential(*stem(8), Dense(8, 4), Dense(12, 4), Dense(16, 4), head(20)),
    "mobile, ReLU6": lambda: nn.Sequential(
        *stem(8), Inverted(8, nn.ReLU6, False), Inverted(8, nn.ReLU6, False), head(8)
    ),
    "mobile, excited": lambda: nn.Sequential(*stem(8), *(Inverted(8, nn.Hardswish, True) for _ in range(2)), head(8)),
    "efficient": lambda: nn.Sequential(*stem(8), *(Inverted(8, nn.SiLU, True) for _ in range(2)), head(8)),
    "U-shaped": UNet,
    "generator": generator,
    "discriminator": discriminator,
    "recurrent": Recurrent,
    "shared activation": shared_activation,
    "plain": vgg,
    "norms with activations, zero-initialised": lambda: nn.Sequential(*stem(8), Zeroed(8), Zeroed(8), head(8)),
    "excited by ReLUs": lambda: nn.Sequential(*stem(16), Excited(16), Excited(16), head(16)),
    "layer scale, zero head": lambda: nn.Sequential(*stem(8), Scaled(8, 1e-5), Scaled(8, 1e-5), zero_head(8)),
    "skip initialisation": lambda: nn.Sequential(*stem(8), Scaled(8, 0.0), Scaled(8, 0.0), head(8)),
    "LeNet": lenet,
}
