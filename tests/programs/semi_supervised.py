"""Semi-supervised learning and distillation."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bn import paused_statistics, recalibrate
from programs.base import Module, Net, average, program, views


class Consistency(Module):
    """The first half of a batch is labelled; `unsupervised` is a subclass's."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        half = len(images) // 2
        return F.cross_entropy(self(images[:half]), labels[:half]) + self.unsupervised(images[half:])

    def unsupervised(self, images: Tensor) -> Tensor:
        raise NotImplementedError


@program()
class PiModel(Consistency):
    def unsupervised(self, images: Tensor) -> Tensor:
        one, other = views(images)
        return F.mse_loss(self(one).softmax(1), self(other).softmax(1))


@program()
class PseudoLabel(Consistency):
    def unsupervised(self, images: Tensor) -> Tensor:
        logits = self(images)
        return F.cross_entropy(logits, logits.argmax(1))


@program()
class FixMatch(Consistency):
    """Labelled, weak and strong images in one forward, as the authors interleave them."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        weak, strong = views(images)
        logits, guessed, answer = self(torch.cat((images, weak, strong))).chunk(3)
        probability, target = guessed.detach().softmax(1).max(1)
        return (
            F.cross_entropy(logits, labels)
            + (F.cross_entropy(answer, target, reduction="none") * (probability > 0.6)).mean()
        )


@program()
class UDA(Consistency):
    def unsupervised(self, images: Tensor) -> Tensor:
        one, other = views(images)
        target = self(one).detach().softmax(1)
        return F.kl_div(self(other).log_softmax(1), target, reduction="batchmean")


@program()
class VAT(Consistency):
    """Virtual adversarial training: the forwards that look for the direction do not move the statistics."""

    def unsupervised(self, images: Tensor) -> Tensor:
        with paused_statistics(self.model):
            target = self(images).detach().softmax(1)
            direction = torch.randn_like(images).requires_grad_()
            loss = F.kl_div(self(images + 1e-1 * direction).log_softmax(1), target)
            (gradient,) = torch.autograd.grad(loss, direction)
            return F.kl_div(
                self(images + F.normalize(gradient.flatten(1), dim=1).reshape_as(images)).log_softmax(1), target
            )


@program()
class MixMatch(Consistency):
    """Labels are guessed in eval mode."""

    def unsupervised(self, images: Tensor) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            target = torch.stack([self(view).softmax(1) for view in views(images)]).mean(0)
        self.model.train()
        share = float(torch.distributions.Beta(0.75, 0.75).sample())
        return F.mse_loss(
            self(share * images + (1 - share) * images.flip(0)).softmax(1),
            share * target + (1 - share) * target.flip(0),
        )


class Taught(Consistency):
    """A teacher whose weights are averaged, in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)

    def unsupervised(self, images: Tensor) -> Tensor:
        one, other = views(images)
        with torch.no_grad():
            target = self.teacher(other).softmax(1)
        return F.mse_loss(self(one).softmax(1), target)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        average(self.teacher, self.model)


@program()
class MeanTeacher(Taught):
    """The teacher is validated too."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.teacher(batch[0])


@program()
class MeanTeacherEveryThirdStep(Taught):
    def on_before_zero_grad(self, optimizer: Any) -> None:
        if self.global_step % 3 == 2:
            average(self.teacher, self.model, 0.5)


@program()
class MeanTeacherWithBuffers(Taught):
    """The teacher in eval mode, with the student's buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher.eval()

    def on_before_zero_grad(self, optimizer: Any) -> None:
        average(self.teacher, self.model, buffers=True)


@program()
class InterpolationConsistency(Taught):
    def unsupervised(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(images).softmax(1)
        return F.mse_loss(self((images + images.flip(0)) / 2).softmax(1), (target + target.flip(0)) / 2)


@program()
class NoisyStudent(Consistency):
    """A trained teacher, frozen and in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Net()
        recalibrate(self.teacher, [torch.randn(64, 1, 6, 6)], progress=False)
        self.teacher.requires_grad_(False).eval()

    def unsupervised(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(images).argmax(1)
        return F.cross_entropy(self(images + 0.1 * torch.randn_like(images)), target)


@program()
class Distillation(NoisyStudent):
    def unsupervised(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            target = (self.teacher(images) / 4).softmax(1)
        return F.kl_div((self(images) / 4).log_softmax(1), target, reduction="batchmean")


@program()
class MutualLearning(Module):
    """Two networks that teach each other."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Net()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        one, other = self(batch[0]), self.other(batch[0])
        agreement = F.mse_loss(one.softmax(1), other.detach().softmax(1)) + F.mse_loss(
            other.softmax(1), one.detach().softmax(1)
        )
        return F.cross_entropy(one, batch[1]) + F.cross_entropy(other, batch[1]) + agreement


@program()
class TemporalEnsembling(Consistency):
    """Targets are an average of the answers of earlier epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("answers", torch.zeros(8, 2))

    def unsupervised(self, images: Tensor) -> Tensor:
        answer = self(images).softmax(1)
        loss = F.mse_loss(answer, self.answers.clone())
        self.answers.lerp_(answer.detach(), 0.4)
        return loss


@program()
class MetaPseudoLabels(Module):
    """The teacher learns from how well its pupil does on labelled images (Pham et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Net()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch[0], batch[1][:8]
        pupil, teacher = self.optimizers()
        answers, guesses = self.teacher(images), self(images)
        targets = answers[8:].detach().argmax(1)
        before = F.cross_entropy(guesses[:8].detach(), labels)
        pupil.zero_grad()
        self.manual_backward(F.cross_entropy(guesses[8:], targets))
        pupil.step()
        with torch.no_grad(), paused_statistics(self.model):
            gain = before - F.cross_entropy(self(images[:8]), labels)
        teacher.zero_grad()
        self.manual_backward(F.cross_entropy(answers[:8], labels) + gain * F.cross_entropy(answers[8:], targets))
        teacher.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.01) for part in (self.model, self.teacher)], []
