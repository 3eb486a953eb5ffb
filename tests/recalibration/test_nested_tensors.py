"""Batches of nested tensors, whose samples differ in length: torch's own batch norm trains on none."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitting import fit
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import BatchNormRecalibration, CompareAverages, Window, recalibrate

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

ROWS = [torch.randn(3 + index % 3, 4, generator=torch.Generator().manual_seed(index)) for index in range(8)]
LAYOUTS = [torch.jagged, torch.strided]


def nested(rows: list[Tensor], layout: Any) -> Tensor:
    return torch.nested.nested_tensor(rows, layout=layout)


@pytest.mark.parametrize("wrap", [lambda batch: batch, lambda batch: (batch, 0)], ids=["alone", "in a tuple"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_recalibrate_refuses_them_and_the_shown_call_works(layout: Any, wrap: Any) -> None:
    """With the forward of the message, the statistics are those of all rows in one tensor; nothing moves before."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    with pytest.raises(TypeError, match=r"batch norm got a nested tensor .*model\(torch\.cat\(batch\.unbind\(\)\)\)"):
        recalibrate(net, [wrap(nested(ROWS, layout))], progress=False)
    assert torch.equal(net[1].running_mean, torch.zeros(6))
    recalibrate(
        net, [nested(ROWS, layout)], forward=lambda model, batch: model(torch.cat(batch.unbind())), progress=False
    )
    torch.testing.assert_close(net[1].running_mean, net[0](torch.cat(ROWS)).mean(0))


class Flattens(pl.LightningModule):
    """Its steps take the rows out of the nested tensor, and its forward does not."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))

    def forward(self, batch: Tensor) -> Tensor:
        return self.net(batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(torch.cat(batch.unbind())).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


FORWARD = {"forward": lambda module, batch: module.net(torch.cat(batch.unbind()))}


@pytest.mark.parametrize("how", [FORWARD, {}], ids=["forward=", "no forward"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("callback", [BatchNormRecalibration, CompareAverages], ids=lambda kind: kind.__name__)
def test_callbacks_find_a_call_that_takes_them(callback: Any, layout: Any, how: Any) -> None:
    """The forward that is given, or training_step, which was tried after the module's own forward had raised."""
    given = ({"window": Window(3)},) if callback is CompareAverages else ()
    data = DataLoader(ROWS, 4, collate_fn=lambda rows: nested(rows, layout))
    module, _ = fit(callback(*given, **how), module=Flattens(), train=data, val=data, max_epochs=1)
    if callback is BatchNormRecalibration:
        expected = module.net[0](torch.cat(ROWS)).mean(0)
        torch.testing.assert_close(module.net[1].running_mean, expected.detach())
