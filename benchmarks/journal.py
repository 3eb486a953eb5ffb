"""What the journal costs a run: bytes, lines, and its share of the process time of a host-bound fit.

The network is narrow and deep, so that a step is what the host does. Every call of a callback on the journal is timed,
the outermost alone; the share is that time in the process time of the whole of `Trainer.fit`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import ActivationStatsMonitor, ModeCheck
from lightning_bn.callbacks.run_journal import RunJournal
from lightning_bn.journal.lines import FILE_NAME, decode

TARGET = 0.01  # of the process time of a host-bound run
BYTES = 20e6


class Deep(pl.LightningModule):
    """Blocks of a linear layer, a batch norm and a ReLU, 16 wide."""

    def __init__(self, norms: int) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()) for _ in range(norms))
        self.model = nn.Sequential(*blocks, nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Clock:
    """Process time spent in the journal."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._is_running = False

    def around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_running:
                return method(*args, **kwargs)
            self._is_running = True
            start = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - start
                self._is_running = False

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=200, help="batch norms and ReLUs, half of each")
    parser.add_argument("--steps", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    clock = Clock()
    for name in ("begin", "epoch", "validation", "modes", "write", "sample", "channels", "episodes", "rule", "end"):
        setattr(RunJournal, name, clock.around(getattr(RunJournal, name)))
    data = TensorDataset(torch.randn(2 * options.steps, 16))
    with TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[ActivationStatsMonitor(verbose=False), ModeCheck(action="log")],
        )
        start = time.process_time()
        trainer.fit(Deep(options.layers // 2), DataLoader(data, 2))
        whole = time.process_time() - start
        text = (Path(folder) / FILE_NAME).read_bytes()
    lines = text.splitlines()
    kinds = Counter(decode(line)["kind"] for line in lines)
    print(f"{options.layers} layers x {options.steps:,} steps, batch 2, default sampling")
    print(f"{len(text) / 1e6:.1f} MB (limit {BYTES / 1e6:g}), {len(lines)} lines: {dict(kinds)}")
    print(
        f"process time: fit {whole:.1f} s, {whole / options.steps * 1e3:.2f} ms a step; journal {clock.seconds:.2f} s"
    )
    print(f"the journal's share: {clock.seconds / whole:.2%} (limit {TARGET:.0%})")


if __name__ == "__main__":
    main()
