"""When statistics do not move: in a recomputation, while paused, in eval."""

from __future__ import annotations

import pytest
import torch
from third_party import Foreign
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_bn import BatchNorm1d, Exponential, Window, convert_batch_norm, paused_statistics
from lightning_bn.torch_internals import in_backward


class Checkpointed(nn.Sequential):
    """A block whose activations are recomputed in backward."""

    def __init__(self, *modules: nn.Module, use_reentrant: bool) -> None:
        super().__init__(*modules)
        self.use_reentrant = use_reentrant

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, batch, use_reentrant=self.use_reentrant)


def train(model: nn.Module, steps: int = 5) -> None:
    torch.manual_seed(3)
    for _ in range(steps):
        model(torch.randn(8, 4, requires_grad=True)).square().sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("averaging", [None, Exponential(0.3, debias=True), Window(3)], ids=str)
def test_recomputation_does_not_count(use_reentrant: bool, averaging: object) -> None:
    """With activation checkpointing, of either kind, statistics and gradients are those without it."""
    plain = nn.Sequential(nn.Linear(4, 4), BatchNorm1d(4, averaging=averaging), nn.Tanh())
    again = Checkpointed(nn.Linear(4, 4), BatchNorm1d(4, averaging=averaging), nn.Tanh(), use_reentrant=use_reentrant)
    again.load_state_dict(plain.state_dict())
    train(plain), train(again)
    for key, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


class Masked(nn.Module):
    """A layer that is called with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = BatchNorm1d(4, averaging=Window(3))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch, torch.arange(len(batch)) < 6)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["masked", "served", "served, in the kernel"])
def test_recomputation_does_not_count_elsewhere(kind: str, use_reentrant: bool) -> None:
    """Nor does it for masked input, nor in a subclass that keeps its own forward."""
    builders = {
        "masked": Masked,
        "served": lambda: convert_batch_norm(Foreign(4), Window(3)),
        "served, in the kernel": lambda: convert_batch_norm(Foreign(4), Exponential(0.1)),
    }
    plain, again = nn.Sequential(builders[kind]()), Checkpointed(builders[kind](), use_reentrant=use_reentrant)
    train(plain), train(again)
    for key, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_torch_counts_twice(use_reentrant: bool) -> None:
    """The mistake that the test above guards against is there in torch's layer."""
    model = Checkpointed(nn.BatchNorm1d(4), use_reentrant=use_reentrant)
    train(model, steps=5)
    assert model[0].num_batches_tracked == 10


def test_in_backward_sees_a_backward() -> None:
    """The private function it stands on is there in this torch, and tells a recomputation from a forward."""
    seen = []
    batch = torch.randn(3, requires_grad=True)
    batch.register_hook(lambda _: seen.append(in_backward()))
    assert not in_backward()
    batch.sum().backward()
    assert seen == [True]


def layers() -> list[nn.Module]:
    served = convert_batch_norm(Foreign(4), Window(3))
    return [nn.BatchNorm1d(4), BatchNorm1d(4), BatchNorm1d(4, averaging=Window(3)), Foreign(4), served]


@pytest.mark.parametrize("index", range(5))
def test_paused(index: int) -> None:
    """Inside, training forwards normalise with the batch and move nothing; the pauses nest, and end with an exception
    too."""
    layer = layers()[index]
    layer(torch.randn(8, 4))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    batch = torch.randn(8, 4) + 3
    with pytest.raises(KeyError), paused_statistics(layer):  # noqa: PT012
        with paused_statistics(layer):
            output = layer(batch)
        layer(batch)
        raise KeyError
    torch.testing.assert_close(output.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key
    layer(batch)
    assert layer.num_batches_tracked == 2


def test_pause_leaves_untracked_layers_alone() -> None:
    """A layer that tracked nothing before tracks nothing after, and eval inside a pause still uses the running
    statistics."""
    silent, loud = nn.BatchNorm1d(4), nn.BatchNorm1d(4).eval()
    silent.track_running_stats = False
    batch = torch.randn(8, 4) + 3
    with paused_statistics(nn.ModuleList([silent, loud])):
        assert torch.equal(loud(batch), nn.BatchNorm1d(4).eval()(batch))
    assert silent.track_running_stats is False
    assert loud.track_running_stats is True


def test_eval_moves_nothing() -> None:
    """An eval forward writes no buffer and no history."""
    layer = BatchNorm1d(4, averaging=Window(3))
    layer(torch.randn(8, 4))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.eval()(torch.randn(8, 4))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
