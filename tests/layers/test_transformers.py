"""Models that no one here wrote: Hugging Face's convolutional networks, built from small configs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from lightning_bn import Exponential, Window, convert_batch_norm, to_torch
from lightning_bn.discovery import find_batch_norms
from lightning_bn.layers.batch_norm import AveragedBatchNorm

BUILDERS = {
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    ),
    "regnet": lambda: RegNetForImageClassification(
        RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4, num_labels=3)
    ),
    "mobilenet": lambda: MobileNetV2ForImageClassification(
        MobileNetV2Config(depth_multiplier=0.1, min_depth=4, num_labels=3)
    ),
}
each_model = pytest.mark.parametrize("name", list(BUILDERS))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILDERS[name]().train()


def train(model: nn.Module, steps: int = 5) -> list[torch.Tensor]:
    """Train from a fixed seed and return the losses."""
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = model(pixel_values=torch.randn(4, 3, 32, 32), labels=torch.randint(0, 3, (4,))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@each_model
def test_five_steps_beside_the_original(name: str) -> None:
    """Converted with Exponential of the model's own momentum and trained beside it, everything is equal to the bit; and
    back."""
    original = build(name)
    converted = copy.deepcopy(original)
    layers = find_batch_norms(original)
    assert len(layers) > 4
    momenta = {layer.module.momentum for layer in layers}
    assert len(momenta) == 1
    convert_batch_norm(converted, Exponential(momenta.pop()))
    assert all(isinstance(layer.module, AveragedBatchNorm) for layer in find_batch_norms(converted))
    assert all(torch.equal(a, b) for a, b in zip(train(original), train(converted), strict=True))
    for key, value in original.state_dict().items():
        assert torch.equal(converted.state_dict()[key], value), key
    fresh = build(name)
    fresh.load_state_dict(to_torch(converted).state_dict(), strict=True)
    batch = torch.randn(2, 3, 32, 32)
    assert torch.equal(fresh.eval()(batch).logits, original.eval()(batch).logits)


@each_model
def test_training_does_not_depend_on_the_average(name: str) -> None:
    """With a window the losses and weights are those of the original to the bit: only the running statistics differ."""
    original = build(name)
    windowed = convert_batch_norm(copy.deepcopy(original), Window(3))
    assert all(torch.equal(a, b) for a, b in zip(train(original), train(windowed), strict=True))
    for key, value in original.named_parameters():
        assert torch.equal(windowed.get_parameter(key), value)
    plain = to_torch(windowed).state_dict()
    build(name).load_state_dict(plain, strict=True)
    assert any(not torch.equal(plain[key], value) for key, value in original.state_dict().items() if "running" in key)
