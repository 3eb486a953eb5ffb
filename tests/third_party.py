"""Batch norms as other packages write them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BatchNormAct2d(nn.BatchNorm2d):
    """A stand-in to the pattern of timm's layer: torch's forward written out, then dropout and activation."""

    def __init__(self, num_features: int, drop: float = 0.0) -> None:
        super().__init__(num_features)
        self.drop, self.act = nn.Dropout(drop), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        tracked = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        x = F.batch_norm(x, mean, var, self.weight, self.bias, self.training, factor, self.eps)
        return self.act(self.drop(x))


class Foreign(nn.BatchNorm1d):
    """Somebody's subclass with a forward of torch's pattern."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2
