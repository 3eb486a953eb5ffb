"""Self-supervised learning."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from programs.base import Module, average, backbone, contrast, mlp, program, views


class TwoViews(Module):
    """An encoder and a projector; what becomes of the two projections is a subclass's `agree`."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(backbone(), mlp(16, 8, 8)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        one, other = views(batch[0])
        return self.agree(self.model(one), self.model(other))

    def agree(self, one: Tensor, other: Tensor) -> Tensor:
        raise NotImplementedError

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.model(batch[0])


@program()
class SimCLR(TwoViews):
    def agree(self, one: Tensor, other: Tensor) -> Tensor:
        return contrast(one, other) + contrast(other, one)


@program()
class SimCLRConcatenated(SimCLR):
    """Both views in one forward, as the authors run it."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.agree(*self.model(torch.cat(views(batch[0]))).chunk(2))


@program()
class BarlowTwins(TwoViews):
    def agree(self, one: Tensor, other: Tensor) -> Tensor:
        one, other = ((each - each.mean(0)) / (each.std(0) + 1e-3) for each in (one, other))
        return (one.T @ other / len(one) - torch.eye(8)).square().sum()


@program()
class VICReg(TwoViews):
    def agree(self, one: Tensor, other: Tensor) -> Tensor:
        spread = sum(F.relu(1 - each.var(0).add(1e-4).sqrt()).mean() for each in (one, other))
        return F.mse_loss(one, other) + spread


@program()
class DecoupledContrast(TwoViews):
    def agree(self, one: Tensor, other: Tensor) -> Tensor:
        logits = F.normalize(one, dim=1) @ F.normalize(other, dim=1).T
        return logits.logsumexp(1).mean() - logits.diagonal().mean()


@program()
class WhitenedMSE(TwoViews):
    def agree(self, one: Tensor, other: Tensor) -> Tensor:
        return F.mse_loss(F.normalize(one, dim=1), F.normalize(other, dim=1))


@program()
class NNCLR(TwoViews):
    """The positive of a sample is its nearest neighbour in a queue, a buffer of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.randn(32, 8), dim=1))

    def agree(self, one: Tensor, other: Tensor) -> Tensor:
        one, other = F.normalize(one, dim=1), F.normalize(other, dim=1)
        nearest = self.queue[(one @ self.queue.T).argmax(1)]
        self.queue = torch.cat((other.detach(), self.queue))[:32]
        return contrast(nearest, other)


@program()
class SwAV(TwoViews):
    """Prototypes that are normalised in place before each step, and codes made without grad."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Linear(8, 5, bias=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        one, other = (self.prototypes(F.normalize(self.model(view), dim=1)) for view in views(batch[0]))
        with torch.no_grad():
            code = (other / 0.05).softmax(0).softmax(1)
        return F.cross_entropy(one, code)


@program()
class SimSiam(TwoViews):
    """The last batch norm of the projector has no affine parameters; a predictor."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(backbone(), mlp(16, 8, 8, last=True))
        self.predictor = mlp(8, 4, 8)

    def agree(self, one: Tensor, other: Tensor) -> Tensor:
        predictions = self.predictor(one), self.predictor(other)
        return (
            -sum(F.cosine_similarity(p, z.detach()).mean() for p, z in zip(predictions, (other, one), strict=True)) / 2
        )


@program()
class FastSiam(SimSiam):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        codes = [self.model(view) for view in views(batch[0], 4)]
        target = torch.stack(codes[1:]).mean(0).detach()
        return -F.cosine_similarity(self.predictor(codes[0]), target).mean()


class WithTeacher(Module):
    """A student and a teacher, whose weights are an average of the student's, in train mode."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(backbone(), mlp(16, 8, 8)))
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self.predictor = mlp(8, 8, 8)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        one, other = views(batch[0])
        with torch.no_grad():
            target = self.teacher(other)
        return 2 - 2 * F.cosine_similarity(self.predictor(self.model(one)), target).mean()

    def on_train_batch_end(self, *args: Any) -> None:
        average(self.teacher, self.model)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.model(batch[0])


@program()
class BYOL(WithTeacher):
    """Averages at the end of a batch."""


@program()
class BYOLBeforeTheForward(WithTeacher):
    """Averages at the head of the step, by ``.data``, as lightly does."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        for own, other in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            own.data = own.data * 0.9 + other.data * 0.1
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        pass


@program()
class MoCo(WithTeacher):
    """A queue of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.randn(32, 8), dim=1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        one, other = views(batch[0])
        query = F.normalize(self.model(one), dim=1)
        with torch.no_grad():
            average(self.teacher, self.model)
            key = F.normalize(self.teacher(other), dim=1)
        logits = torch.cat(((query * key).sum(1, keepdim=True), query @ self.queue.T), 1)
        self.queue = torch.cat((key, self.queue))[:32]
        return F.cross_entropy(logits, torch.zeros(len(query)).long())

    def on_train_batch_end(self, *args: Any) -> None:
        pass


@program()
class MoCoV3(WithTeacher):
    """Symmetric, without a queue."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        one, other = views(batch[0])
        with torch.no_grad():
            keys = self.teacher(one), self.teacher(other)
        return contrast(self.predictor(self.model(one)), keys[1]) + contrast(self.predictor(self.model(other)), keys[0])


@program()
class DINO(WithTeacher):
    """A centre that is a buffer, more views for the student than for the teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(8))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        all_views = views(batch[0], 4)
        with torch.no_grad():
            targets = [self.teacher(view) for view in all_views[:2]]
            probabilities = [((target - self.center) / 0.1).softmax(1) for target in targets]
            self.center.lerp_(torch.cat(targets).mean(0), 0.1)
        answers = [self.predictor(self.model(view)) for view in all_views[2:]]
        return sum(F.cross_entropy(answer, probability) for answer in answers for probability in probabilities)


@program()
class TiCo(WithTeacher):
    """A running covariance as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("covariance", torch.zeros(8, 8))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        code = F.normalize(self.model(batch[0].roll(1, -1)), dim=1)
        self.covariance = 0.9 * self.covariance + 0.1 * (code.T @ code).detach() / len(code)
        return loss + 0.1 * ((code @ self.covariance) * code).sum(1).mean()


@program()
class RotNet(Module):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(backbone(), nn.Linear(16, 4)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        turns = torch.arange(len(batch[0])) % 4
        images = torch.stack([image.rot90(int(turn), (1, 2)) for image, turn in zip(batch[0], turns, strict=True)])
        return F.cross_entropy(self.model(images), turns)


@program()
class OnlineProbe(SimCLR):
    """A classifier on detached features, beside the loss, as the validation of self-supervised runs."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Linear(16, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        one, other = views(batch[0])
        features = self.model[0](one)
        loss = self.agree(self.model[1](features), self.model(other))
        return loss + F.cross_entropy(self.probe(features.detach()), batch[1])


@program()
class DeepCluster(Module):
    """Pseudo-labels, made in eval mode at the head of each epoch."""

    def on_train_epoch_start(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(torch.randn(16, 1, 6, 6))
        self.model.train()


@program()
class DenoisingAutoencoder(Module):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(backbone(), mlp(16, 16, 36)))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.mse_loss(self(batch[0] + 0.1 * torch.randn_like(batch[0])), batch[0].flatten(1))


@program()
class SupCon(TwoViews):
    """Images of one class attract each other (Khosla et al. 2020)."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        vectors = F.normalize(self.model(torch.cat(views(batch[0]))), dim=1)
        itself = torch.eye(len(vectors), dtype=torch.bool)
        alike = batch[1].repeat(2)[:, None].eq(batch[1].repeat(2)) & ~itself
        chances = (vectors @ vectors.T / 0.5).masked_fill(itself, -1e9).log_softmax(1)
        return -(chances * alike).sum() / alike.sum()
