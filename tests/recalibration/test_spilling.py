"""`exact=True` within a budget of memory: the same bits, with activations of waiting batches in a file."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from recalibration_models import cnn, everything
from states import as_bytes
from torch import Tensor, nn

from lightning_bn import BatchNorm2d, recalibrate
from lightning_bn.recalibration import spilling

BATCHES = list(torch.randn(6, 8, 1, 24, 24, generator=torch.Generator().manual_seed(0)))


class Awkward(nn.Module):
    """Keeps activations in every way: across layers, on the module for other batches, as an array, in a generator, for
    a backward pass, written in place after a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)), BatchNorm2d(6)
        self.middle = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))
        self.cached: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cached is None:
            self.cached = torch.rand(8, 6, 24, 24, generator=torch.Generator().manual_seed(1)) * x.mean()
        outer = self.first[0](x)
        array = (outer * 2).numpy()
        for y in self.normalised(outer):
            y.relu_()
        with torch.enable_grad():
            weight = self.first[0].weight.detach().requires_grad_()
            inside = self.last(nn.functional.conv2d(x, weight, padding=1) + y)
            (slope,) = torch.autograd.grad(inside.square().sum(), weight)
        y = y + torch.from_numpy(array) + outer + self.cached + slope.mean()
        values = (y + torch.tensor(self.cached.tolist())).tolist()
        return self.last(torch.tensor(values)) + y

    def normalised(self, x: Tensor) -> Any:
        for layer in (self.first[1], *self.middle):
            kept = x + 1
            x = layer(x) + kept
            yield x


def recalibrated_with(model: nn.Module, **options: Any) -> tuple[dict[str, bytes], Any]:
    model = copy.deepcopy(model)
    report = recalibrate(model, BATCHES, exact=True, progress=False, **options)
    return {name: as_bytes(value) for name, value in model.state_dict().items()}, report


@pytest.mark.parametrize("budget", [0, 2e5, 1e6])
@pytest.mark.parametrize("make", [lambda: cnn(2), Awkward], ids=["residual", "awkward"])
def test_the_statistics_are_the_same_bits_within_any_budget(make: Any, budget: float) -> None:
    """Those without a budget; the report says what was in the file."""
    torch.manual_seed(0)
    model = make()
    free, in_memory = recalibrated_with(model, memory_budget=float("inf"))
    within, report = recalibrated_with(model, memory_budget=budget)
    assert within == free
    assert in_memory.spilled == in_memory.as_dict()["spilled"] == 0
    assert report.spilled > 0
    assert f"in a temporary file: {report.spilled / 2**20:.0f} MB" in str(report)


def test_what_fits_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default: as long as there is half of the free memory."""
    monkeypatch.setattr(spilling._File, "write", lambda *_: pytest.fail("written"))
    recalibrate(cnn(1), BATCHES, exact=True, progress=False)


def test_the_host_holds_what_a_device_cant(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of an accelerator, taken on the CPU."""
    torch.manual_seed(0)
    model = cnn(1)
    free, _ = recalibrated_with(model, memory_budget=float("inf"))
    monkeypatch.setattr(spilling, "_goes_to_a_file", lambda storage: False)
    within, report = recalibrated_with(model, memory_budget=0)
    assert within == free
    assert report.spilled > 0


def test_no_more_than_the_budget_is_held_by_waiting_batches() -> None:
    """In one storage a batch: of six batches of 1 MB three fit 3.5 MB, and three are in the file."""
    made: list[torch.UntypedStorage] = []
    held: list[int] = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        activation = torch.ones(2**16, 4) * batch[0, 0, 0, 0]  # 1 MB
        made.append(activation.untyped_storage())
        model(activation[:64])
        held.append(sum(storage.nbytes() > 0 for storage in made))
        activation.mul_(1)

    report = recalibrate(
        nn.BatchNorm1d(4), BATCHES, forward=forward, exact=True, progress=False, memory_budget=3.5 * 2**20
    )
    assert 3 * 2**20 <= report.spilled < 4 * 2**20
    assert held == [3, 3, 3, 4, 5, 6]


@pytest.mark.parametrize("where", range(4))
def test_an_exception_leaves_everything_and_what_others_hold(where: int) -> None:
    """The model is as before, and an activation that the caller holds is in memory again."""
    torch.manual_seed(0)
    model, kept, seen = cnn(2), [], iter(range(99))
    model[2].bn1.register_forward_hook(lambda *_: 1 / 0 if next(seen) == where else None)
    before = everything(model)

    def forward(model: nn.Module, batch: Tensor) -> None:
        kept.append((batch + 1, bytes((batch + 1).flatten()[:9].byte().tolist())))
        model(kept[-1][0])

    with pytest.raises(ZeroDivisionError):
        recalibrate(model, BATCHES, forward=forward, exact=True, progress=False, memory_budget=0)
    assert before == everything(model)
    assert all(bytes(tensor.flatten()[:9].byte().tolist()) == bits for tensor, bits in kept)


@pytest.mark.parametrize("options", [{"memory_budget": 100}, {"exact": True, "memory_budget": -1}])
def test_a_budget_goes_with_exact(options: dict[str, Any]) -> None:
    """Without it no batch waits."""
    with pytest.raises(ValueError, match=r"recalibrate\(exact=.*, memory_budget=.*with exact=True"):
        recalibrate(cnn(1), BATCHES, **options)
