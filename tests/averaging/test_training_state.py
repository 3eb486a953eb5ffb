"""The window's history is private training state: kept from casts, broadcasts and weight averaging, and from nothing
else."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import oracles
import processes
import pytest
import torch
from fitting import trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from lightning_bn import BatchNorm1d, BatchNorm2d, Exponential, Window

HISTORY = ("rows", "totals", "cursor")


def trained(dtype: torch.dtype | None = None) -> BatchNorm1d:
    layer = BatchNorm1d(3, averaging=Window(4), dtype=dtype)
    for t in range(7):
        layer(torch.randn(8, 3, dtype=dtype) + t)
    return layer


def history(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: getattr(layer.averaging, name).clone() for name in HISTORY}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in HISTORY)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_leave_its_accuracy(dtype: torch.dtype) -> None:
    """Cast to 16 bits, a layer trains on from the same history, and its statistics keep the accuracy of float32."""
    layer, cast = trained(), trained()
    cast.load_state_dict(layer.state_dict())
    cast.to(dtype)
    assert same(history(layer), history(cast))
    batches = [(torch.randn(64, 3) * 0.1 + 5).to(dtype) for _ in range(4)]
    for batch in batches:
        cast(batch)
    mean, var = oracles.window([oracles.channels(batch.float()) for batch in batches], 4, False)
    np.testing.assert_allclose(cast.running_mean.double(), mean, rtol=1e-6)
    np.testing.assert_allclose(cast.running_var.double(), var, rtol=1e-5)


def test_a_float64_layer_has_a_float64_history() -> None:
    """.double() widens the history with the layer, and .float() afterwards takes nothing from it."""
    layer = trained().double()
    assert layer.averaging.rows.dtype == torch.float64
    assert trained(torch.float64).float().averaging.rows.dtype == torch.float64


def test_moves_with_the_layer(device: torch.device) -> None:
    """.to(device) takes it along with its values; so do .to("meta") and to_empty, after which reset_parameters makes it
    good."""
    layer = trained()
    moved = copy.deepcopy(layer).to(device)
    assert all(getattr(moved.averaging, name).device.type == device.type for name in HISTORY)
    assert same(history(layer), {name: value.cpu() for name, value in history(moved).items()})

    ghost = layer.to("meta")
    assert all(getattr(ghost.averaging, name).is_meta for name in HISTORY)
    real = ghost.to_empty(device=device)
    real.reset_parameters()
    real(torch.ones(4, 3, device=device) * torch.arange(4.0, device=device).unsqueeze(1))
    torch.testing.assert_close(real.running_mean, torch.full((3,), 1.5, device=device))


def test_built_on_meta() -> None:
    """A layer may be built on the meta device and filled from a checkpoint."""
    source = trained()
    layer = BatchNorm1d(3, averaging=Window(4), device="meta").to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    assert same(history(source), history(layer))


def test_a_plain_checkpoint_loads_strictly() -> None:
    """Torch's checkpoint fits a windowed layer; the loaded statistics serve, and the window starts with the next
    batch."""
    plain = nn.BatchNorm1d(3)
    plain(torch.randn(8, 3) + 2)
    layer = trained()
    layer.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(layer.running_mean, plain.running_mean)
    batch = torch.randn(8, 3)
    torch.testing.assert_close(layer.eval()(batch), plain.eval()(batch))
    layer.train()(batch)
    torch.testing.assert_close(layer.running_mean, batch.mean(0))
    assert layer.num_batches_tracked == 2


def test_another_window_is_refused() -> None:
    """The history of a window of another length is refused, and the error names both and says what to do."""
    with pytest.raises(
        RuntimeError,
        match=r"averaging\.state_of \(it holds the state of Window\(size=4\).*by Window\(size=9\).*drop the keys",
    ):
        BatchNorm1d(3, averaging=Window(9)).load_state_dict(trained().state_dict())


def test_a_torn_history_is_missing() -> None:
    """Half a history is no history: a strict load names the key that lacks."""
    state = trained().state_dict()
    del state["averaging.cursor"]
    with pytest.raises(RuntimeError, match=r"Missing key.*averaging\.cursor"):
        trained().load_state_dict(state)


def test_it_is_no_buffer() -> None:
    """What copies or averages buffers does not see it."""
    assert {name for name, _ in trained().named_buffers()} == {"running_mean", "running_var", "num_batches_tracked"}


def test_a_saved_state_is_a_copy() -> None:
    """Averages over a whole state_dict (timm's ModelEma) write into the tensors they find there; the history is none of
    these."""
    layer = trained()
    before = history(layer)
    for key, value in layer.state_dict().items():
        if "averaging" in key:
            value.fill_(7)
    assert same(history(layer), before)


def test_swa_leaves_it_alone() -> None:
    """torch's AveragedModel(use_buffers=True) averages the statistics, not the history."""
    layer = trained()
    average = AveragedModel(layer, use_buffers=True)
    average.update_parameters(layer)
    at_start = history(average.module)
    layer(torch.randn(8, 3) + 50)
    average.update_parameters(layer)
    assert same(history(average.module), at_start)


class Small(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 3), BatchNorm1d(3, averaging=Window(4)), nn.Linear(3, 1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightnings_weight_averaging_leaves_it_alone(tmp_path: Path) -> None:
    """A fit with EMAWeightAveraging(use_buffers=True) ends with the very history of a fit without it."""
    ends = []
    for callbacks in ([], [EMAWeightAveraging(decay=0.9, use_buffers=True)]):
        torch.manual_seed(0)
        module = Small()
        loader = DataLoader(torch.randn(48, 4), batch_size=8)
        runner = trainer(*callbacks, max_epochs=2, default_root_dir=tmp_path)
        runner.fit(module, loader)
        ends.append(history(module.layers[1]))
    assert same(*ends)


def _rank(rank: int, world: int, folder: Path) -> dict[str, Tensor]:
    processes.join_group(rank, world, folder / "store")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(BatchNorm2d(3, averaging=Window(4)), nn.Conv2d(3, 1, 1)))
    for t in range(6):
        model(torch.randn(4, 3, 2, 2) + 10 * rank + t).sum().backward()
    return model.module.state_dict()


def test_ddp_does_not_broadcast_it(tmp_path: Path) -> None:
    """Two real processes keep each its own history: rank 1's holds rank 1's batches, where a buffer would be rank
    0's."""
    first, second = processes.results(_rank, 2, tmp_path)
    assert first["0.running_mean"].max() < 6
    assert second["0.running_mean"].min() > 8
    assert not torch.equal(first["0.averaging.rows"], second["0.averaging.rows"])


def test_exponential_has_none() -> None:
    """An average that needs no history adds no key to the state dict."""
    assert list(BatchNorm1d(3, averaging=Exponential(0.1)).state_dict()) == list(nn.BatchNorm1d(3).state_dict())
