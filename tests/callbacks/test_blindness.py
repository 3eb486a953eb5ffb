"""What the monitor does not look at by default: named once, and computed as without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitting import fit, trainer
from small_models import Small
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import ActivationStatsMonitor


class Batched(pl.LightningModule):
    """Takes a gradient for each output at once, or for each sample, as optimizers that want them do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)), how
        self.automatic_optimization = False

    def gradients(self, batch: Tensor) -> dict[str, Tensor]:
        named = dict(self.net.named_parameters())
        if self.how == "is_grads_batched":
            outputs, each = self.net(batch).mean(0), torch.eye(3)
            found = torch.autograd.grad(outputs, list(named.values()), each, is_grads_batched=True)
            return {name: values.sum(0) for name, values in zip(named, found, strict=True)}
        values = {name: each.detach() for name, each in named.items()}
        if self.how == "jacrev":
            found = torch.func.jacrev(lambda given: torch.func.functional_call(self.net, given, batch).mean(0))(values)
            return {name: each.sum(0) for name, each in found.items()}

        def loss(given: dict[str, Tensor], sample: Tensor) -> Tensor:
            return torch.func.functional_call(self.net, given, sample[None]).square().sum()

        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, batch)
        return {name: each.mean(0) for name, each in found.items()}

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for name, gradient in self.gradients(batch).items():
            self.net.get_parameter(name).grad = gradient
        self.optimizers().step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("how", ["is_grads_batched", "jacrev", "vmap"])
def test_what_is_batched_is_named_once(how: str) -> None:
    """The layers whose gradients, or under vmap whose activations, stand for many; what can be read is there."""
    monitor = ActivationStatsMonitor(every_n_steps=1, gradients=True, verbose=False)
    with pytest.warns(UserWarning, match="batched by torch.vmap") as told:
        trainer(monitor, max_epochs=1).fit(Batched(how), DataLoader(torch.randn(64, 4), 16))
    (said,) = [str(each.message) for each in told if "can't read" in str(each.message)]
    assert ("its gradient: batched" in said) == (how != "vmap")
    assert "net.1" in said
    assert "net.2" in said
    norm = next(row for row in monitor.table() if row["layer"] == "net.1")
    assert norm["grad_norm"] > 0
    assert (norm["std"] is None) == (how == "vmap")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(64), nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.attention(h, h, h, key_padding_mask=src_key_padding_mask, need_weights=False)[0]


def encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)


BODIES: dict[str, Any] = {
    "encoder": lambda: nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False),
    "nested tensors": lambda: nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=True),
    "one layer": encoder_layer,
    "attention": Attention,
}


class Sequences(pl.LightningModule):
    """A body that is in eval mode in training from a batch on, and takes no gradient then."""

    def __init__(self, body: nn.Module, frozen_from: int | None) -> None:
        super().__init__()
        self.body, self.head, self.frozen_from = body, nn.Linear(64, 1), frozen_from
        self.seen: list[float] = []

    def on_train_epoch_start(self) -> None:
        self.body.train(self.frozen_from != 0)

    def on_train_batch_end(self, *_: Any) -> None:
        self.body.train(self.frozen_from is None)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.body.training):
            inner = self.body(x, src_key_padding_mask=mask)
        return self.head(inner[:, :5].mean(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self(*batch).square().mean()
        self.seen.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.seen += self(*batch).flatten().tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@contextmanager
def without_fast_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def seen(kind: str, frozen_from: int | None, *callbacks: pl.Callback) -> list[float]:
    torch.manual_seed(0)
    module = Sequences(BODIES[kind](), frozen_from)
    torch.manual_seed(2)
    mask = (torch.arange(20) >= torch.arange(5, 21).unsqueeze(1)).repeat(2, 1)
    data = DataLoader(TensorDataset(torch.randn(32, 20, 64), mask), 8)
    fit(*callbacks, module=module, train=data, val=data)
    return module.seen


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("frozen_from", [None, 0, 1], ids=["trained", "frozen", "frozen from the second batch on"])
@pytest.mark.parametrize("kind", BODIES)
def test_torchs_fast_path_is_left_to_itself(kind: str, frozen_from: int | None) -> None:
    """Losses and predictions are the same to the bit with and without the monitor, where torch runs attention as one
    kernel in eval mode: in validation, and in training where that part is frozen. It says what it leaves out, once a
    stage."""
    plain = seen(kind, frozen_from)
    if kind != "nested tensors":
        with without_fast_path():
            assert seen(kind, frozen_from) != plain  # torch does take it here, and it rounds differently
    monitor = ActivationStatsMonitor(every_n_steps=1, verbose=False)
    with pytest.warns(UserWarning, match="leaves out what it can't read") as told:
        assert seen(kind, frozen_from, monitor) == plain
    texts = [str(one.message) for one in told if "one kernel" in str(one.message)]
    assert [text.partition("read in ")[2].partition(":")[0] for text in texts] == (
        ["validation"] if frozen_from is None else ["validation", "training"]
    )
    normed = {row["layer"] for row in monitor.table() if row["stage"] == "train" and "norm" in row["layer"]}
    assert bool(normed) == (frozen_from != 0 or kind == "attention")


def test_what_is_chosen_by_name_is_looked_at_in_eval_mode_too() -> None:
    """Rounding is what the user takes into account then."""
    monitor = ActivationStatsMonitor("body.norm1", every_n_steps=1, verbose=False)
    seen("one layer", None, monitor)
    assert {row["stage"] for row in monitor.table() if row["layer"] == "body.norm1"} == {"train", "val"}


class ByType(nn.Module):
    """A norm of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("layers", [None, nn.BatchNorm1d], ids=["default", "chosen"])
def test_a_norm_that_cannot_be_read_is_named_once(layers: Any, recwarn: pytest.WarningsRecorder) -> None:
    """By default, with the reason; whoever chose other layers does not ask."""
    module = Small()
    module.bn1 = nn.Sequential(module.bn1, ByType())
    fit(ActivationStatsMonitor(layers, every_n_steps=1, verbose=False), module=module)
    texts = [str(one.message) for one in recwarn if "running statistics of" in str(one.message)]
    assert texts == (
        []
        if layers
        else [
            "ActivationStatsMonitor can't read the running statistics of bn1.1 (ByType): it is no subclass of torch's "
            "batch norm. layers='bn1.1' looks at the activations."
        ]
    )
