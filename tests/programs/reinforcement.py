"""Reinforcement learning: observations are images, rewards are made of labels."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from programs.base import Module, Net, average, program


class WithTarget(Module):
    """A value network, and a target network in eval mode whose state follows it."""

    def __init__(self) -> None:
        super().__init__(Net())
        self.target = copy.deepcopy(self.model).requires_grad_(False).eval()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        with torch.no_grad():
            value = labels.float() + 0.9 * self.following(images.roll(1, 0))
        return F.mse_loss(self(images).gather(1, labels[:, None]).flatten(), value)

    def following(self, images: Tensor) -> Tensor:
        return self.target(images).max(1).values

    def on_train_batch_end(self, *args: Any) -> None:
        average(self.target, self.model, buffers=True)


@program()
class DQN(WithTarget):
    """The target's state is loaded every second step."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 0:
            self.target.load_state_dict(self.model.state_dict())


@program()
class SoftTarget(WithTarget):
    """Polyak averaging of the weights, with the buffers."""


@program()
class TargetInTrainMode(WithTarget):
    """Weights alone are averaged, and the target normalises with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.target.train()

    def on_train_batch_end(self, *args: Any) -> None:
        average(self.target, self.model)


@program()
class CrossQ(Module):
    """No target network: both states go through the value network in one batch."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        now, following = self(torch.cat((batch[0], batch[0].roll(1, 0)))).chunk(2)
        return F.mse_loss(now.gather(1, batch[1][:, None]).flatten(), batch[1] + 0.9 * following.detach().max(1).values)


@program()
class ActorCritic(Module):
    """A policy and a value of one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(16, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        features = self.model.backbone(batch[0])
        policy, value = self.model.head(features).log_softmax(1), self.value(features.flatten(1)).flatten()
        advantage = batch[1] - value
        return advantage.square().mean() - (policy.gather(1, batch[1][:, None]).flatten() * advantage.detach()).mean()


@program()
class PPO(ActorCritic):
    """Old probabilities come from a rollout in eval mode."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            old = self(batch[0]).log_softmax(1).gather(1, batch[1][:, None])
        self.model.train()
        ratio = (self(batch[0]).log_softmax(1).gather(1, batch[1][:, None]) - old).exp()
        return -torch.minimum(ratio, ratio.clamp(0.8, 1.2)).mean()


@program()
class RolloutsBetweenEpochs(Module):
    """An agent that plays in eval mode before each epoch."""

    def on_train_epoch_start(self) -> None:
        self.eval()
        with torch.no_grad():
            for _ in range(3):
                self(torch.randn(1, 1, 6, 6))
        self.train()


@program()
class DDPG(Module):
    """An actor and a critic by hand, with soft targets that have buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(38, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.targets = nn.ModuleList(
            copy.deepcopy(part).requires_grad_(False).eval() for part in (self.model, self.critic)
        )
        self.automatic_optimization = False

    def value(self, critic: nn.Module, images: Tensor, action: Tensor) -> Tensor:
        return critic(torch.cat((images.flatten(1), action), 1)).flatten()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, rewards = batch
        actor, critic = self.optimizers()
        with torch.no_grad():
            target = rewards + 0.9 * self.value(self.targets[1], images, self.targets[0](images))
        critic.zero_grad()
        self.manual_backward(F.mse_loss(self.value(self.critic, images, torch.randn(len(images), 2)), target))
        critic.step()
        self.improve(actor, images)

    def improve(self, actor: Any, images: Tensor) -> None:
        """A step of the actor, and one of the targets."""
        actor.zero_grad()
        self.manual_backward(-self.value(self.critic, images, self(images)).mean())
        actor.step()
        for own, other in zip(self.targets, (self.model, self.critic), strict=True):
            average(own, other, buffers=True)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.model, self.critic)], []


@program()
class BehaviourCloning(Module):
    """Supervised, with an entropy bonus."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        logits = self(batch[0])
        return F.cross_entropy(logits, batch[1]) + 0.01 * (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


@program()
class TD3(DDPG):
    """Two critics, noise on the target's action, and an actor that learns in every second step."""

    def __init__(self) -> None:
        super().__init__()
        self.second = copy.deepcopy(self.critic)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, rewards = batch
        actor, critic = self.optimizers()
        with torch.no_grad():
            action = self.targets[0](images) + 0.1 * torch.randn(len(images), 2)
            target = rewards + 0.9 * self.value(self.targets[1], images, action)
        taken = torch.randn(len(images), 2)
        critic.zero_grad()
        values = [self.value(each, images, taken) for each in (self.critic, self.second)]
        self.manual_backward(sum(F.mse_loss(value, target) for value in values))
        critic.step()
        if batch_idx % 2 == 0:
            self.improve(actor, images)

    def configure_optimizers(self) -> Any:
        critics = [*self.critic.parameters(), *self.second.parameters()]
        return [torch.optim.Adam(parameters, 1e-3) for parameters in (self.model.parameters(), critics)], []


@program()
class SelfPlay(ActorCritic):
    """AlphaZero: games that the network plays in eval mode before an epoch are what it learns from."""

    def __init__(self) -> None:
        super().__init__()
        self.boards, self.moves = torch.empty(0), torch.empty(0)

    def on_train_epoch_start(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.boards = torch.randn(32, 1, 6, 6)
            self.moves = self(self.boards).softmax(1)
        self.model.train()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        played = torch.randint(32, (16,))
        features = self.model.backbone(self.boards[played])
        policy = F.cross_entropy(self.model.head(features), self.moves[played])
        return policy + F.mse_loss(self.value(features.flatten(1)).flatten(), batch[1].float())
