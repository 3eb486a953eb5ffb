"""What a repair adds to a process's resident set at its peak, and the CPU time it takes; Linux alone.

Each cell is a process of its own: the model, one batch, an eval forward on it as warm-up, then the peak is counted from
there on (`/proc/self/clear_refs`). fvcore's `update_bn_stats` is measured the same way in the same run, and timed in
turn with `recalibrate` in one process; printed is the median of the rounds' ratios. The second table is
`BatchNormRecalibration` at the end of a fit with Adam, the third `exact=True` with more and more batches, the last
`lightning-bn inspect` of a checkpoint of 1,000 MB beside ``import torch``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import resnet
import torch
from fvcore.nn.precise_bn import update_bn_stats
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import BatchNormRecalibration, recalibrate


class ViT(nn.Module):
    """ViT-B of 16x16 patches, with a batch norm behind the patches' embedding and one before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(3, 768, 16, 16), nn.BatchNorm2d(768))
        self.blocks = nn.Sequential(*[nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True) for _ in range(12)])
        self.head = nn.Sequential(nn.BatchNorm1d(768), nn.Linear(768, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(images).flatten(2).transpose(1, 2)).mean(1))


def wide() -> nn.Module:
    """1e8 parameters in four layers."""
    layers = [nn.Sequential(nn.Linear(5000, 5000, bias=False), nn.BatchNorm1d(5000), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(*layers)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-50": (resnet.resnet50, (4, 3, 32, 32)),
    "ViT-B with two batch norms": (ViT, (2, 3, 64, 64)),
    "1e8 parameters": (wide, (16, 5000)),
}


def fvcore(model: nn.Module, batches: list[Tensor]) -> None:
    update_bn_stats(model, batches, len(batches))


def ours(model: nn.Module, batches: list[Tensor], **options: Any) -> None:
    recalibrate(model, batches, progress=False, **options)


def resident(which: str) -> float:
    """Return VmRSS, the resident set, or VmHWM, its peak, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


class Peak:
    """The resident set's peak over what it was at the last `begin`."""

    def begin(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self._before = resident("VmRSS")

    def added(self) -> float:
        return resident("VmHWM") - self._before


def prepared(name: str, number: int = 1, gradients: bool = False) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, batches = make().train(), [torch.randn(shape) for _ in range(number)]
    for parameter in model.parameters() if gradients else ():
        parameter.grad = torch.ones_like(parameter)
    with torch.no_grad():
        model.eval()(batches[0])
    model.train()
    ours(nn.Sequential(nn.BatchNorm1d(2)), [torch.randn(4, 2)])  # imports
    return model, batches


def recalibrating(name: str, which: str) -> float:
    model, batches = prepared(name, gradients=which == "with gradients")
    peak = Peak()
    peak.begin()
    (fvcore if which == "fvcore" else ours)(model, batches)
    return peak.added()


def ratio(name: str, rounds: int) -> tuple[float, float]:
    """Return fvcore's CPU milliseconds, and ours by fvcore's."""
    model, batches = prepared(name)
    seconds: dict[str, list[float]] = {"fvcore": [], "ours": []}
    for number in range(rounds + 1):
        for which, way in (("fvcore", fvcore), ("ours", ours)):
            model.train()
            start = time.process_time()
            way(model, batches)
            if number:
                seconds[which].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["fvcore"], strict=True)]
    return 1000 * statistics.median(seconds["fvcore"]), statistics.median(ratios)


class Fitted(pl.LightningModule):
    """24 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(2000, 2000), nn.BatchNorm1d(2000))])

    def forward(self, batch: Tensor) -> Tensor:
        return self.layers(batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class Around(pl.Callback):
    """Counts from where it stands before the callback to where it stands behind it."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.act()


def at_fit_end() -> tuple[float, float]:
    """Return the MB of parameters and those that the callback adds."""
    peak, found = Peak(), []
    repair = BatchNormRecalibration()
    callbacks = [Around(peak.begin), repair, Around(lambda: found.append(peak.added()))]
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, **dict.fromkeys(silent, False))
    module = Fitted()
    trainer.fit(module, DataLoader(torch.randn(32, 2000), 16))
    return sum(p.numel() * 4 for p in module.parameters()) / 2**20, found[0]


def exact(number: int, options: dict[str, Any]) -> tuple[float, float, int]:
    """Return MB added, CPU seconds, and the MB that were spilled, of a pass over `number` batches."""
    torch.manual_seed(0)
    model, batches = resnet.resnet20(), list(torch.randn(number, 16, 3, 32, 32))
    ours(model, batches[:1], exact=True)
    peak = Peak()
    peak.begin()
    start = time.process_time()
    report = recalibrate(model, batches, exact=True, progress=False, **options)
    seconds = time.process_time() - start
    return peak.added(), seconds, report.spilled >> 20


def peak_of(program: str) -> float:
    """Return the peak of a process that runs `program`, in MB."""
    told = f"{program}\nimport sys\nprint(open('/proc/self/status').read(), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    return int(done.stderr.partition("VmHWM:")[2].split()[0]) / 1024


def inspected() -> tuple[float, float]:
    """Return the peaks of a process that imports torch, and of one that inspects a checkpoint of 1,000 MB."""
    state = nn.BatchNorm1d(8).state_dict() | {f"w{place}": torch.zeros(25 * 2**18) for place in range(40)}
    with TemporaryDirectory() as folder:
        path = f"{folder}/weights.ckpt"
        torch.save(state, path)
        return peak_of("import torch"), peak_of(f"from lightning_bn.cli import main\nmain(['inspect', {path!r}])")


def alone(call: Callable[..., Any]) -> Any:
    """Call it in a process of its own."""
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(call)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print("\n| " + " | ".join(header) + " |\n|---|" + "---:|" * (len(header) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--budget", type=float, default=64, help="MB that exact=True may hold")
    options = parser.parse_args()
    if sys.platform != "linux":
        sys.exit("Peaks of the resident set are read from Linux's /proc.")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = []
    for name, (make, _) in MODELS.items():
        size = sum(p.numel() * 4 for p in make().parameters()) / 2**20
        peaks = [alone(partial(recalibrating, name, which)) for which in ("fvcore", "ours", "with gradients")]
        theirs, times = alone(partial(ratio, name, options.rounds))
        rows.append([name, f"{size:.0f}", *(f"{peak:.0f}" for peak in peaks), f"{theirs:.0f}", f"{times:.2f}"])
    added = ["fvcore adds, MB", "recalibrate", "with gradients"]
    print_table(["one batch", "parameters, MB", *added, "fvcore, ms", "recalibrate's time of it"], rows)
    size, peak = alone(at_fit_end)
    print_table(
        ["at fit end, Adam", "parameters, MB", "added, MB"], [["BatchNormRecalibration", f"{size:.0f}", f"{peak:.0f}"]]
    )
    rows = []
    for number in options.batches:
        for budget in (float("inf"), options.budget * 2**20):
            peak, seconds, spilled = alone(partial(exact, number, {"memory_budget": budget}))
            rows.append([str(number), f"{budget / 2**20:.0f}", f"{peak:.0f}", f"{seconds:.1f}", f"{spilled}"])
    header = [
        "ResNet-20, exact=True, batches of 16x3x32x32",
        "memory_budget, MB",
        "added, MB",
        "CPU seconds",
        "in a file, MB",
    ]
    print_table(header, rows)
    least, peak = alone(inspected)
    print_table(["a checkpoint of 1,000 MB", "import torch, MB", "inspect, MB"], [["", f"{least:.0f}", f"{peak:.0f}"]])


if __name__ == "__main__":
    main()
