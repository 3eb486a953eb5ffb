"""Generative adversarial networks, autoencoders, adversarial examples."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bn import recalibrate
from programs.base import Module, Net, average, backbone, mlp, program


class GAN(Module):
    """A generator and a critic, two optimizers, the generator run again for the critic's step."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(mlp(4, 16, 36), nn.Unflatten(1, (1, 6, 6)))
        self.critic = self.make_critic()
        self.automatic_optimization = False

    def make_critic(self) -> nn.Module:
        return nn.Sequential(backbone(), nn.Linear(16, 1))

    def source(self, images: Tensor) -> Tensor:
        """What the generator makes an image of."""
        return torch.randn(len(images), 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, _ = batch
        for optimizer, loss in zip(self.optimizers(), (self.generator_loss, self.critic_loss), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss(images))
            optimizer.step()

    def generator_loss(self, images: Tensor) -> Tensor:
        return F.softplus(-self.critic(self.model(self.source(images)))).mean()

    def critic_loss(self, images: Tensor) -> Tensor:
        fake = self.model(self.source(images)).detach()
        return F.softplus(-self.critic(images)).mean() + F.softplus(self.critic(fake)).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.critic(self.model(self.source(batch[0])))

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.model, self.critic)], []


def both(module: GAN, batch: list[Tensor]) -> None:
    """The generator makes images, which the critic judges."""
    module.critic(module.model(module.source(batch[0])))


@program(forward=both)
class DCGAN(GAN):
    """Batch-norm weights drawn from N(1, 0.02)."""

    def __init__(self) -> None:
        super().__init__()
        for part in self.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(part.weight, 1.0, 0.02)


@program(forward=both)
class LSGAN(GAN):
    def generator_loss(self, images: Tensor) -> Tensor:
        return (self.critic(self.model(self.source(images))) - 1).square().mean()

    def critic_loss(self, images: Tensor) -> Tensor:
        fake = self.model(self.source(images)).detach()
        return (self.critic(images) - 1).square().mean() + self.critic(fake).square().mean()


@program(forward=both)
class HingeGAN(GAN):
    def critic_loss(self, images: Tensor) -> Tensor:
        real, fake = self.critic(torch.cat((images, self.model(self.source(images)).detach()))).chunk(2)
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


@program(forward=both)
class WGAN(GAN):
    """Five steps of the critic for one of the generator; its weights are clipped in place."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        generator, critic = self.optimizers()
        critic.zero_grad()
        self.manual_backward(self.critic_loss(batch[0]))
        critic.step()
        with torch.no_grad():
            for parameter in self.critic.parameters():
                parameter.clamp_(-0.5, 0.5)
        if batch_idx % 5 == 0:
            generator.zero_grad()
            self.manual_backward(-self.critic(self.model(self.source(batch[0]))).mean())
            generator.step()


@program(forward=both)
class WGANGP(GAN):
    """A gradient penalty; the critic has no batch norm, as its authors say."""

    def make_critic(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.LeakyReLU(), nn.Linear(8, 1))

    def critic_loss(self, images: Tensor) -> Tensor:
        fake = self.model(self.source(images)).detach()
        mixed = (images + fake).div(2).requires_grad_()
        (gradient,) = torch.autograd.grad(self.critic(mixed).sum(), mixed, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        return self.critic(fake).mean() - self.critic(images).mean() + penalty


@program(forward=both)
class InfoGAN(GAN):
    """The critic's features tell the code too."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(16, 4)

    def generator_loss(self, images: Tensor) -> Tensor:
        source = self.source(images)
        features = self.critic[0](self.model(source))
        return F.softplus(-self.critic[1](features)).mean() + F.mse_loss(self.code(features), source)

    def configure_optimizers(self) -> Any:
        (generator, critic), _ = super().configure_optimizers()
        generator.add_param_group({"params": list(self.code.parameters())})
        return [generator, critic], []


@program()
class PixToPix(GAN):
    """A translation network with a reconstruction loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)
        )

    def source(self, images: Tensor) -> Tensor:
        return images.flip(-1)

    def generator_loss(self, images: Tensor) -> Tensor:
        fake = self.model(self.source(images))
        return F.softplus(-self.critic(fake)).mean() + F.l1_loss(fake, images)


@program()
class SRGAN(PixToPix):
    """A perceptual loss: a pretrained network in eval mode that gradients flow through."""

    def __init__(self) -> None:
        super().__init__()
        self.perception = backbone()
        recalibrate(self.perception, [torch.randn(64, 1, 6, 6)], progress=False)
        self.perception.eval()  # its parameters require grad, and are in no optimizer

    def generator_loss(self, images: Tensor) -> Tensor:
        fake = self.model(self.source(images))
        return F.softplus(-self.critic(fake)).mean() + F.mse_loss(self.perception(fake), self.perception(images))


@program(forward=lambda module, batch: module.critic(module.model[1](module.model[0](batch[0]))))
class CycleGAN(GAN):
    """Two translators and one critic."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleList(
            nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))
            for _ in range(2)
        )

    def generator_loss(self, images: Tensor) -> Tensor:
        there = self.model[0](images)
        return F.softplus(-self.critic(there)).mean() + F.l1_loss(self.model[1](there), images)

    def critic_loss(self, images: Tensor) -> Tensor:
        return F.softplus(-self.critic(images)).mean() + F.softplus(self.critic(self.model[0](images).detach())).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.model[1](self.model[0](batch[0]))


@program(forward=both)
class AveragedGenerator(GAN):
    """Samples are drawn from an averaged copy with its buffers, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)

    def on_train_batch_end(self, *args: Any) -> None:
        average(self.ema, self.model, buffers=True)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.ema(self.source(batch[0]))


@program(forward=both)
class SamplesEachEpoch(GAN):
    """Draws samples at the end of an epoch, in eval mode."""

    def on_train_epoch_end(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(torch.randn(4, 4))
        self.model.train()


@program()
class VAE(Module):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(backbone(), nn.Linear(16, 8)))
        self.decoder = mlp(4, 16, 36)

    def loss(self, batch: list[Tensor]) -> Tensor:
        mean, log_var = self.model(batch[0]).chunk(2, 1)
        image = self.decoder(mean + torch.randn_like(mean) * (log_var / 2).exp())
        return F.mse_loss(image, batch[0].flatten(1)) + 0.5 * (mean.square() + log_var.exp() - log_var - 1).mean()


@program()
class AdversarialTraining(Module):
    """PGD: the attack runs in eval mode."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.model.eval()
        attack = torch.zeros_like(batch[0]).requires_grad_()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(self.loss([batch[0] + attack, batch[1]]), attack)
            attack = (attack + 0.1 * gradient.sign()).detach().requires_grad_()
        self.model.train()
        return self.loss([batch[0] + attack.detach(), batch[1]])


@program()
class DomainAdversarial(Module):
    """DANN: a domain classifier behind a reversed gradient."""

    def __init__(self) -> None:
        super().__init__(Net())
        self.domain = nn.Linear(4 * 2 * 2, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        features = self.model.backbone(torch.cat((batch[0], batch[0] + 1)))
        reversed_ = (2 * features.detach() - features).flatten(1)
        domains = torch.arange(2).repeat_interleave(len(batch[0]))
        return F.cross_entropy(self.model.head(features)[: len(batch[0])], batch[1]) + F.cross_entropy(
            self.domain(reversed_), domains
        )


class ConditionalNorm(nn.Module):
    """A batch norm without affine parameters, scaled by the class."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, affine=False)
        self.scale = nn.Embedding.from_pretrained(torch.ones(2, channels), freeze=False)

    def forward(self, vectors: Tensor, labels: Tensor) -> Tensor:
        return self.norm(vectors) * self.scale(labels)


class OfClasses(nn.Module):
    """Makes an image of noise and a class."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 16, bias=False), ConditionalNorm(16), nn.Linear(16, 36)

    def forward(self, noise: Tensor) -> Tensor:
        labels = (noise[:, 0] > 0).long()
        return self.last(self.norm(self.first(noise), labels).relu()).unflatten(1, (1, 6, 6))


@program(forward=both)
class BigGAN(AveragedGenerator):
    """Class-conditional batch norms, and an average of the generator."""

    def __init__(self) -> None:
        super().__init__()
        self.model = OfClasses()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)


@program(forward=both)
class StandingStatistics(BigGAN):
    """Before samples are drawn, the statistics of the averaged generator are estimated anew."""

    def on_validation_start(self) -> None:
        noise = [torch.randn(16, 4) for _ in range(4)]
        recalibrate(self.ema, noise, layers="all", progress=False)
