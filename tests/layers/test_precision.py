"""In 16 bits the parameters are rounded; the running statistics are not."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from fitting import SaveAtStep7, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import (
    Averaging,
    BatchNorm1d,
    BatchNorm2d,
    Cumulative,
    Exponential,
    Window,
    convert_batch_norm,
    to_torch,
)

AVERAGES = [Exponential(0.1), Exponential(0.1, debias=True), Exponential(0.1, pooled=True), Window(3), Cumulative()]


def stream(layer: nn.Module, steps: int) -> float:
    """Feed batches of mean 5 and return the running mean."""
    batch = torch.full((2, 1), 5.0) + torch.tensor([[-1.0], [1.0]])
    for _ in range(steps):
        layer(batch.bfloat16())
    return layer.running_mean.item()


def test_no_stall() -> None:
    """3000 updates at momentum 0.01 towards mean 5 arrive, however the layer came to be bfloat16; torch's stop on the
    way."""
    cast = BatchNorm1d(1, averaging=Exponential(0.01)).bfloat16()
    built = BatchNorm1d(1, averaging=Exponential(0.01), dtype=torch.bfloat16)
    converted = convert_batch_norm(nn.BatchNorm1d(1).bfloat16(), Exponential(0.01))
    for layer in (cast, built, converted):
        assert layer.weight.dtype == torch.bfloat16
        assert stream(layer, 3000) >= 4.99
    assert stream(nn.BatchNorm1d(1, momentum=0.01).bfloat16(), 3000) < 3.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("averaging", AVERAGES, ids=str)
def test_eval_is_float32_rounded(averaging: Averaging, dtype: torch.dtype, device: torch.device) -> None:
    """Eval output lies within the dtype's own rounding of the float32 layer's, and the state dict's keys are torch's at
    the least."""
    wide = BatchNorm2d(3, averaging=averaging, device=device)
    narrow = BatchNorm2d(3, averaging=averaging, device=device).to(dtype)
    for t in range(6):
        batch = (torch.randn(8, 3, 4, 4, device=device) * 2 + t).to(dtype)
        wide(batch.float()), narrow(batch)
    torch.testing.assert_close(narrow.running_mean, wide.running_mean, rtol=1e-5, atol=1e-5)
    expected, output = wide.eval()(batch.float()), narrow.eval()(batch)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert set(nn.BatchNorm2d(3).state_dict()) <= set(narrow.state_dict())


def test_to_torch_gives_what_the_kernel_takes() -> None:
    """The plain layer of a 16-bit model has 16-bit statistics, beside which alone torch runs."""
    layer = BatchNorm1d(3, averaging=Window(3)).bfloat16()
    batch = torch.randn(8, 3).bfloat16()
    layer(batch)
    plain = to_torch(layer).eval()
    assert plain.running_mean.dtype == torch.bfloat16
    assert plain(batch).isfinite().all()


class Module(pl.LightningModule):
    def __init__(self, averaging: Averaging | None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), BatchNorm1d(8, averaging=averaging), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        # By the step, not by the loader: Lightning does not take a plain loader up in the middle of an epoch.
        batch = torch.randn(16, 4, generator=torch.Generator().manual_seed(self.global_step))
        return self.layers(batch.to(self.layers[0].weight.dtype)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: pl.LightningModule, folder: Path, precision: str, ckpt_path: Path | None = None) -> dict[str, Tensor]:
    """Train for two epochs of five steps, saving at step 7, in the middle of the second epoch and of a window."""
    torch.manual_seed(0)
    runner = trainer(SaveAtStep7(folder / "step7.ckpt"), max_epochs=2, precision=precision)
    runner.fit(module, DataLoader(torch.zeros(5, 4)), ckpt_path=ckpt_path)
    return module.state_dict()


# The batches here come from the step, not from the loader.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("averaging", [None, *AVERAGES], ids=str)
def test_resumed_in_mid_window(averaging: Averaging | None, precision: str, tmp_path: Path) -> None:
    """A run that was stopped in the middle of an epoch and of a window ends bit for bit as one that was not."""
    torch.manual_seed(0)
    first = Module(averaging)
    expected = fit(first, tmp_path / "whole", precision)
    checkpoint = tmp_path / "whole" / "step7.ckpt"
    second = Module(averaging)
    if precision == "64-true":
        second.double()  # Lightning loads the checkpoint before it casts the module, and would round it to float32
    resumed = fit(second, tmp_path / "resumed", precision, checkpoint)
    assert set(resumed) == set(expected)
    for key, value in expected.items():
        assert torch.equal(resumed[key], value), key
        assert resumed[key].dtype == value.dtype, key
    assert expected["layers.1.num_batches_tracked"] == 10
    loaded = Module.load_from_checkpoint(checkpoint, averaging=averaging, weights_only=True)
    assert loaded.layers[1].num_batches_tracked == 7
