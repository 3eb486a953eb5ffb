"""A batch is moved whole, whatever it is made of."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from lightning_bn import recalibrate
from lightning_bn.recalibration.feeding import to_device

Pair = namedtuple("Pair", "image label")


@dataclass
class Sample:
    image: Tensor
    label: str
    seen: int = field(default=3, init=False)


class Movable:
    """What graph libraries hand out: no tensor, with a `to`."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def to(self, device: torch.device) -> Movable:
        return Movable(self.data.to(device))


def leaves(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    parts = (
        batch.values()
        if isinstance(batch, dict)
        else batch
        if isinstance(batch, (list, tuple))
        else getattr(batch, "__dict__", {}).values()
    )
    return [leaf for part in parts for leaf in leaves(part)]


def test_every_tensor_in_a_batch_is_moved_and_all_else_kept() -> None:
    """Tuples, namedtuples, lists, mappings, dataclasses, packed sequences, whatever has a `to`; strings and numbers
    stay."""
    x = torch.zeros(2, 3)
    packed = nn.utils.rnn.pack_padded_sequence(x.unsqueeze(2), torch.tensor([3, 2]), batch_first=True)
    batch = [x, (x, "a"), Pair(x, 1), {"b": [x, None]}, OrderedDict(c=x), Sample(x, "d"), Movable(x), 2.5]
    moved = to_device(batch, torch.device("meta"))
    assert len(leaves(moved)) == 7
    assert all(leaf.is_meta for leaf in leaves(moved))
    assert not any(leaf.is_meta for leaf in leaves(batch))
    assert (type(moved[2]), type(moved[5]), moved[5].label, moved[5].seen, moved[7]) == (Pair, Sample, "d", 3, 2.5)
    assert to_device(packed, torch.device("cpu")).data.shape == packed.data.shape


def test_a_lightning_module_without_a_forward_is_told_of_forward() -> None:
    """The message says what is missing and what to pass, and the call it names works."""

    class Steps(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

    module, batches = Steps(), [torch.randn(4, 2)]
    with pytest.raises(
        TypeError, match=r"Steps has no forward.*recalibrate\(model, batches, forward=lambda model, batch: model"
    ):
        recalibrate(module, batches, progress=False)
    assert module.norm.running_mean.tolist() == [0, 0]
    recalibrate(module, batches, forward=lambda model, batch: model.norm(batch), progress=False)
    assert module.norm.running_mean.tolist() != [0, 0]


class MovesItself:
    """A batch of molecules, whose `to` forgets to return it."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def to(self, device: torch.device) -> None:
        self.data = self.data.to(device)


class WithAttributes(dict[str, Any]):
    """As configuration libraries and detection toolboxes have them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


@dataclass
class Output(ModelOutput):
    """Of transformers: a mapping, a dataclass and a sequence at once."""

    x: Tensor | None = None
    y: Tensor | None = None


def test_what_arrives_is_what_was_given() -> None:
    """An object that moves itself is still there, alone and inside others; mappings keep their class and attributes."""
    graph, device = MovesItself(torch.ones(2)), torch.device("meta")
    assert to_device(graph, device) is graph
    assert graph.data.is_meta
    assert to_device((graph, {"graph": graph}), device) == (graph, {"graph": graph})
    with_attributes = to_device(WithAttributes(x=torch.ones(2)), device)
    assert type(with_attributes) is WithAttributes
    assert with_attributes.x.is_meta
    output = to_device(Output(x=torch.ones(2), y=torch.ones(1)), device)
    assert type(output) is Output
    assert output.x is not None
    assert output.x.is_meta
    assert output[0] is output.x


@pytest.mark.parametrize("forward", [None, lambda model, batch: model(batch)])
def test_a_batch_that_is_no_tensor_goes_in_as_it_is(forward: Any) -> None:
    """A batch of graphs: neither a tensor, a sequence nor a mapping."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, graph: MovesItself) -> Tensor:
            return self.norm(graph.data)

    net = Net()
    data = torch.randn(16, 3)
    recalibrate(net, [MovesItself(data[:8]), MovesItself(data[8:])], forward=forward, progress=False)
    assert torch.allclose(net.norm.running_mean, data.mean(0), atol=1e-6)
    with pytest.raises(TypeError, match=r"a NoneType is no batch.*forward="):
        recalibrate(net, [None], progress=False)
