"""Fine-tuning and transfer learning."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch import Tensor, nn

from lightning_bn import recalibrate
from programs.base import Module, program


class Pretrained(Module):
    """A backbone with the statistics of some data, and a new head."""

    def __init__(self) -> None:
        super().__init__()
        recalibrate(self.model, [torch.randn(64, 1, 6, 6)], layers="all", progress=False)
        self.backbone = self.model.backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.model.head(self.backbone(images))


@program()
class LinearProbe(Pretrained):
    """A backbone frozen and in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.requires_grad_(False).eval()


@program()
class LinearProbeUnderNoGrad(LinearProbe):
    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(images)
        return self.model.head(features)


@program()
class FreezesEachEpoch(Pretrained):
    """Puts the frozen backbone in eval mode at the head of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.backbone.eval()


@program()
class FreezesEachStep(FreezesEachEpoch):
    """Or at the head of each step."""

    def on_train_epoch_start(self) -> None:
        pass

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.backbone.eval()
        return self.loss(batch)


@program(lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1), max_epochs=3)
class LightningsBackboneFinetuning(Pretrained):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.head.parameters(), lr=0.01)


class Schedule(BaseFinetuning):
    """The defaults of finetuning-scheduler: all but the last group frozen, batch norms too, which keep track of their
    batches; one group more in each epoch."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        for parameter in pl_module.backbone.parameters():
            parameter.requires_grad = False

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch > 0:
            group = list(pl_module.backbone[2 - epoch].parameters())
            for parameter in group:
                parameter.requires_grad = True
            optimizer.add_param_group({"params": group})


@program(Schedule, max_epochs=3)
class FinetuningScheduler(Pretrained):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.head.parameters(), lr=0.01)


@program(max_epochs=3)
class GradualUnfreezing(Pretrained):
    """By hand, with modes: a block more in each epoch."""

    def on_train_epoch_start(self) -> None:
        for number, block in enumerate(self.backbone):
            frozen = number < 2 - self.current_epoch
            block.requires_grad_(not frozen).train(not frozen)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@program()
class OnlyNorms(Pretrained):
    """Affine parameters and statistics of the batch norms alone (Frankle et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        for part in self.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.requires_grad_(True)


@program()
class Adapters(LinearProbe):
    """A low-rank part beside a frozen network."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Sequential(nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False))

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return self.model.head(features + self.adapter(features.flatten(1)).reshape_as(features))


@program()
class TowardsTheStart(Pretrained):
    """L2-SP: a penalty on the distance from the pretrained weights, which are kept in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.start = [parameter.detach().clone() for parameter in self.parameters()]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        distance = sum((now - then).square().sum() for now, then in zip(self.parameters(), self.start, strict=True))
        return self.loss(batch) + 0.01 * distance


@program()
class LoadedInEvalMode(Pretrained):
    """A model that was loaded in eval mode, and put in train mode when the fit starts."""

    def __init__(self) -> None:
        super().__init__()
        self.model.eval()

    def on_fit_start(self) -> None:
        self.model.train()


@program()
class WithoutForgetting(Pretrained):
    """Learning without forgetting: the answers of the old head, of a frozen copy, are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.old = nn.Linear(16, 2).requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        features = self.backbone(batch[0])
        old = self.old(features.flatten(1))
        return F.cross_entropy(self.model.head(features), batch[1]) + 0.1 * F.mse_loss(old, old.detach().round())


@program()
class NormsOfDomains(Module):
    """One network for two domains, with batch norms for each."""

    def __init__(self) -> None:
        super().__init__(nn.Module())
        self.convolution = nn.Conv2d(1, 4, 3, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))

    def forward(self, images: Tensor, domain: int = 1) -> Tensor:
        return self.head(self.norms[domain](self.convolution(images)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        domain = batch_idx % 2
        return F.cross_entropy(self(batch[0] * (1 + domain) + domain, domain), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for domain in range(2):
            self(batch[0] * (1 + domain) + domain, domain)
