"""What the page calls the cause is what the monitor calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fitting import trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import ActivationStatsMonitor
from lightning_bn.activations.episodes import causes
from lightning_bn.dashboard.report import find_journal
from lightning_bn.dashboard.view import overview_of
from lightning_bn.journal.reader import JournalReader


class Dying(LightningModule):
    """At step 3 a channel of the second layer dies, at step 5 the whole first one."""

    def __init__(self) -> None:
        super().__init__()
        layers = [(nn.Conv2d(3 if not n else 16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for n in range(3)]
        self.net = nn.Sequential(*[each for block in layers for each in block])
        self.head = nn.Linear(16, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            if self.global_step == 3:
                self.net[4].bias[3] = -100.0
            if self.global_step == 5:
                self.net[1].bias.fill_(-100.0)
        return F.cross_entropy(self.head(self.net(batch[0]).mean((2, 3))), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def heads(run: dict[str, Any]) -> list[tuple[str, str, int]]:
    return [
        (each["layers"][0], each["statistic"], each["first"]) for each in run["findings"] if each["follows"] is None
    ]


def test_the_page_names_the_causes_of_the_verdict_in_its_order(tmp_path: Path) -> None:
    """A channel that died a sample earlier than a whole layer above it waits, as it would if that had begun to die."""
    torch.manual_seed(0)
    monitor = ActivationStatsMonitor(every_n_steps=2, verbose=False)
    data = TensorDataset(torch.randn(192, 3, 8, 8), torch.arange(192) % 4)
    fit = trainer(monitor, max_epochs=2, logger=CSVLogger(tmp_path))
    fit.fit(Dying(), DataLoader(data, 32))
    reader = JournalReader()
    reader.feed(find_journal(tmp_path).read_bytes())
    episodes = [(each.episode.layer, each.episode.statistic, each.episode.first) for each in causes(monitor.episodes())]
    assert episodes[0] == ("net.2", "dead_fraction", 6)
    assert min(each.first for each in monitor.episodes()) == 4
    assert heads(overview_of(reader, "run", str(tmp_path), 0.0)) == episodes
